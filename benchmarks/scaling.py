"""Uptraining speed with one and with several processes, on a random Llama; needs no network.

usage: scaling.py FOLDER [--shape 8b] [--layers 8] [--processes 1 2] [--steps 40] [--batch 64] [--set A.B=VALUE]
       scaling.py FOLDER --gather layer step --profile  # both ways to gather, and where the time of a step goes
       scaling.py FOLDER --shape tiny --length 128 --batch 8 --set device=cpu --set train.micro_batch_size=2  # on a CPU

Runs the command line as a user would (`torchrun -m cla_convert.cli uptrain`), by default cross-entropy of Llama 3.2
1B's shape on random tokens, 64 sequences of 2048 a step, and stops it after the last step: with all of 8B trained a
checkpoint would take 100 GB. Prints tokens/s after the warm-up, MFU, the peak memory of a GPU, the scaling efficiency,
and how far the losses of the first 20 steps lie apart.
"""

import argparse
import json
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


def uptrain(
    folder: Path, processes: int, steps: int, settings: dict[str, Any], more: list[str], *, profile: bool = False
) -> Rows:
    """Run so many steps; the rows of metrics.jsonl that belong to them. And print where the time of three more goes."""
    out, profiled = folder / f"out{processes}", folder / "profile.json"
    profiled.unlink(missing_ok=True)
    for left in (out, out.with_name(f"{out.name}.state")):
        shutil.rmtree(left, ignore_errors=True)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    values = [f"train.{name}={value}" for name, value in settings.items()]
    values += [f"data.sources=[{{path: {folder / 'source.jsonl'}}}]", *more]
    program = [Path(__file__).parent / "profiled_steps.py", profiled, steps] if profile else ["-m", "cla_convert.cli"]
    command = [sys.executable, *launcher, *program, "uptrain", folder / "converted", out, "--teacher",
               folder / "source", *(word for value in values for word in ("--set", value))]  # fmt: skip
    process, rows = psutil.Popen(list(map(str, command)), stdout=subprocess.DEVNULL), []
    while (len(rows) < steps or (profile and not profiled.exists())) and process.poll() is None:
        time.sleep(0.2)
        rows = [row for row in read_rows(out.with_name(f"{out.name}.state") / "metrics.jsonl") if "loss" in row]
    if len(rows) < steps:
        sys.exit(f"{processes} processes: ended after {len(rows)} steps with code {process.returncode}")
    family = [*process.children(recursive=True), process]  # workers of torchrun outlive it
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(family)
    if profiled.exists():
        print(json.dumps(json.loads(profiled.read_text()), indent=1))
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
    parser.add_argument("--gather", nargs="+", default=["auto"], help="train.gather of several processes, each in turn")
    parser.add_argument("--profile", action="store_true")
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
    runs = [(n, way) for n in options.processes for way in (options.gather if n > 1 else ["auto"])]
    base: Rows = []
    for number, gather in runs:
        one = {**settings, "gather": gather}
        rows = uptrain(folder, number, options.steps, one, options.set, profile=options.profile)
        print(f"{number} processes, gather={gather}: {described(rows)}", flush=True)
        if not base:
            base = rows
            continue
        gain, ideal = speed(rows) / speed(base), number / options.processes[0]
        pairs = zip(base[:COMPARED], rows[:COMPARED], strict=True)
        apart = max(abs(before["loss"] - after["loss"]) / before["loss"] for before, after in pairs)
        print(f"    {gain:.2f} x the first ({gain / ideal:.0%} of ideal); losses of the first {COMPARED} steps at most "
              f"{apart:.1e} apart, relative to their size", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
