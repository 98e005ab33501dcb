"""Uptraining speed with one and with several processes, on a random Llama; needs no network.

usage: scaling.py FOLDER [--shape 8b] [--layers 8] [--processes 1 2] [--steps 40] [--batch 64] [--set A.B=VALUE]
       scaling.py FOLDER --shape tiny --length 128 --batch 8 --set device=cpu --set train.micro_batch_size=2  # on a CPU

Runs the command line as a user would (`torchrun -m cla_convert.cli uptrain`), by default cross-entropy of Llama 3.2
1B's shape on random tokens, 64 sequences of 2048 a step, and stops it after the last step: with all of 8B trained a
checkpoint would take 100 GB. Prints tokens/s after the warm-up, MFU, the peak memory of a GPU, the scaling efficiency,
and how far the losses of the first 20 steps lie apart.
"""

import argparse
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from shapes import SHAPES, sizes
from streaming_memory import make_source

from cla_convert.files import read_rows

COMPARED, WARM_UP = 20, 10
Rows = list[dict[str, Any]]


def make_inputs(folder: Path, shape: dict[str, Any], device: str) -> None:
    """source/ (random weights, a tokenizer of numbers), converted/ and source.jsonl (random numbers)."""
    from cla_convert.conversion.convert import convert
    from cla_convert.conversion.plan import make_plan
    from cla_convert.models.checkpoint import Checkpoint

    make_source(folder / "source", shape, 5_000_000_000, device)
    checkpoint = Checkpoint.open(folder / "source")
    convert(make_plan(checkpoint, sharing="cla2-keep-ends", init="first"), checkpoint, folder / "converted")


def uptrain(folder: Path, processes: int, steps: int, settings: dict[str, Any], more: list[str]) -> Rows:
    """Run so many steps; the rows of metrics.jsonl that belong to them."""
    out = folder / f"out{processes}"
    for left in (out, out.with_name(f"{out.name}.state")):
        shutil.rmtree(left, ignore_errors=True)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    values = [f"train.{name}={value}" for name, value in settings.items()]
    values += [f"data.sources=[{{path: {folder / 'source.jsonl'}}}]", *more]
    command = [sys.executable, *launcher, "-m", "cla_convert.cli", "uptrain", folder / "converted", out, "--teacher",
               folder / "source", *(word for value in values for word in ("--set", value))]  # fmt: skip
    process, rows = psutil.Popen(list(map(str, command)), stdout=subprocess.DEVNULL), []
    while len(rows) < steps and process.poll() is None:
        time.sleep(0.2)
        rows = [row for row in read_rows(out.with_name(f"{out.name}.state") / "metrics.jsonl") if "loss" in row]
    if len(rows) < steps:
        sys.exit(f"{processes} processes: ended after {len(rows)} steps with code {process.returncode}")
    family = [*process.children(recursive=True), process]  # workers of torchrun outlive it
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(family)
    return rows[:steps]


def speed(rows: Rows) -> float:
    """Tokens per second after the warm-up."""
    first, last = rows[min(WARM_UP, len(rows) - 1) - 1], rows[-1]
    return (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])


def described(rows: Rows) -> str:
    """Speed, share of the hardware's peak, and memory (of the first process's device)."""
    last = rows[len(rows) // 2 :]
    parts = [f"{speed(rows):.0f} tokens/s"]
    if shares := [row["mfu"] for row in last if row.get("mfu")]:
        parts.append(f"MFU {median(shares):.0%}")
    if peaks := [row["peak_memory_bytes"] for row in last if row.get("peak_memory_bytes")]:
        parts.append(f"{max(peaks) / 2**30:.1f} GiB")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="in place of the shape's own")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64, help="sequences a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--made-on", default="cpu", help="device that makes the random weights")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    folder, tokens = options.folder.absolute(), options.batch * options.length
    if not (folder / "converted").exists():
        make_inputs(folder, sizes(options.shape, options.layers), options.made_on)
    settings = {
        "loss": "cross_entropy", "tokens": (options.steps + 5) * tokens, "batch_tokens": tokens,
        "sequence_length": options.length, "micro_batch_size": 8, "validation_tokens": options.length,
        "validate_every": 0, "checkpoint_every": 0, "learning_rate": 1e-4,
    }  # fmt: skip
    runs = {number: uptrain(folder, number, options.steps, settings, options.set) for number in options.processes}
    base, *others = options.processes
    print(f"{base} process: {described(runs[base])}")
    for n in others:
        gain = speed(runs[n]) / speed(runs[base])
        pairs = zip(runs[base][:COMPARED], runs[n][:COMPARED], strict=True)
        apart = max(abs(one["loss"] - other["loss"]) / one["loss"] for one, other in pairs)
        print(f"{n} processes: {described(runs[n])}, {gain:.2f} x ({gain * base / n:.0%} of ideal)")
        print(f"losses of the first {COMPARED} steps: at most {apart:.1e} apart, relative to their size")


if __name__ == "__main__":
    main()
