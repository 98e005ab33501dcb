"""Calibrated conversion on one device and on several, of a random model: seconds, and how far the results lie apart.

usage: conversion_devices.py FOLDER                                          8B shape, one GPU and two; 50 GB of disk
       conversion_devices.py FOLDER --shape tiny --devices cpu --devices cpu,cpu       a dry run in seconds

Makes a random bfloat16 checkpoint FOLDER/SHAPE once and converts it (`cla2-keep-ends`, by default what `tokens: auto`
takes of an 8B model) once for every `--devices`, each in a process of its own. Seconds are those that `convert`
reports, from the plan to the model on the disk. Differences are from the output of the first: of each tensor, the norm
of the difference over its norm. Steps of block reconstruction are rounded to bfloat16, so that devices which add up in
another order come out a little apart; how well the groups fit (mean relative error behind attention) is what counts.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from shapes import SHAPES, sizes
from streaming_memory import make_source

SHARING = "cla2-keep-ends"


def convert(source: Path, out: Path, devices: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """In this process."""
    import torch

    from cla_convert.conversion.convert import convert as execute
    from cla_convert.conversion.initialisation import CalibrationText
    from cla_convert.conversion.plan import make_plan
    from cla_convert.models.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(source)
    vocabulary, generator = checkpoint.config["vocab_size"], torch.Generator().manual_seed(0)
    rows = torch.randint(2, vocabulary, (options.tokens // options.length, options.length), generator=generator)
    result = execute(
        make_plan(checkpoint, sharing=SHARING, init="calibrated"), checkpoint, out,
        calibration=CalibrationText(rows, "random", devices, steps=options.steps), overwrite=True,
    )  # fmt: skip
    cuda = [device for device in devices if device.startswith("cuda")]
    return {
        "devices": devices,
        "seconds": result["seconds"],
        "gpu_gib": [round(torch.cuda.max_memory_allocated(device) / 2**30, 2) for device in cuda],
        "rss_gib": round(result["peak_rss_bytes"] / 2**30, 2),
        "mismatch": [group["damage"] for group in result["groups"] if "damage" in group],
    }


def differences(one: Path, other: Path) -> dict[str, Any]:
    """Of all tensors of two outputs: the largest and the median of those that differ, and how many do not."""
    from cla_convert.models.checkpoint import Checkpoint

    first, second = Checkpoint.open(one), Checkpoint.open(other)
    assert first.tensors.keys() == second.tensors.keys()
    apart = {}
    for name in first.tensors:
        mine, theirs = first.read(name).float(), second.read(name).float()
        if difference := float((mine - theirs).norm() / mine.norm()):
            apart[name] = difference
    worst = max(apart, key=lambda name: apart[name], default="")
    return {
        "equal_tensors": len(first.tensors) - len(apart),
        "different_tensors": len(apart),
        "largest_difference": {worst: apart[worst]} if apart else {},
        "median_difference": sorted(apart.values())[len(apart) // 2] if apart else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="in place of the shape's own")
    parser.add_argument("--devices", action="append", help="cuda:0,cuda:1; repeatable")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, help="of block reconstruction")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    several = [named.split(",") for named in options.devices or ["cuda:0", "cuda:0,cuda:1"]]
    folder = options.folder.absolute()
    source, outs = folder / options.shape, [folder / f"out{number}" for number in range(len(several))]
    if options.worker is not None:
        print(json.dumps(convert(source, outs[options.worker], several[options.worker], options)))
        return
    if not source.exists():
        started = time.monotonic()
        make_source(source, sizes(options.shape, options.layers), 5_000_000_000, several[0][0])
        print(f"made {source} in {time.monotonic() - started:.0f} s", flush=True)
    results = []
    for number, out in enumerate(outs):
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(number)]
        results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        shown = {name: value for name, value in results[-1].items() if name != "mismatch"}
        mean = sum(results[-1]["mismatch"]) / max(1, len(results[-1]["mismatch"]))
        print(json.dumps(shown | {"mean_mismatch": round(mean, 6)}), flush=True)
        if number:
            ratio = results[-1]["seconds"] / results[0]["seconds"]
            print(json.dumps({"time_of_the_first": round(ratio, 3)} | differences(outs[0], out)), flush=True)
    for out in outs:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
