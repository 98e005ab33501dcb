"""`cla-convert`, and where the time of three steps of its training goes: scaling.py --profile starts it.

    torchrun --nproc-per-node 2 benchmarks/profiled_steps.py FILE STEP uptrain MODEL OUT ...

Writes, after step STEP + 2, to FILE what the first process's GPU did, in milliseconds a step: kernels alone, kernels
while NCCL exchanges something, NCCL alone, nothing; and the kernels that took most. A profiler makes the host slower:
"nothing" is more than without one.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cla_convert.cli import main
from cla_convert.environment import rank
from cla_convert.training import loop

PROFILED = 3
Spans = list[tuple[float, float]]


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """The same time in spans that do not overlap, in order."""
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def shares(kernels: list[tuple[str, float, float]]) -> dict[str, float]:
    """Milliseconds a step, of kernels with their first and last microsecond."""
    computing = union((start, end) for name, start, end in kernels if "nccl" not in name.lower())
    exchanging = union((start, end) for name, start, end in kernels if "nccl" in name.lower())
    busy, first, last = length(union(computing + exchanging)), computing[0][0], computing[-1][1]
    both = length(computing) + length(exchanging) - busy
    parts = {
        "computing alone": length(computing) - both,
        "computing and exchanging": both,
        "exchanging alone": length(exchanging) - both,
        "nothing": last - first - busy,
    }
    return {name: round(value / 1000 / PROFILED, 2) for name, value in parts.items()}


def slowest(kernels: list[tuple[str, float, float]], count: int = 20) -> list[tuple[str, float]]:
    """Names of kernels and milliseconds a step."""
    times = Counter[str]()
    for name, start, end in kernels:
        times[name[:90]] += end - start  # pyright: ignore[reportArgumentType]
    return [(name, round(time / 1000 / PROFILED, 2)) for name, time in times.most_common(count)]


def profiled(file: Path, first: int) -> None:
    """Let the training's loop profile its steps from `first` on."""
    take_step, profiler = loop.take_step, profile(activities=[ProfilerActivity.CUDA])

    def step(trainer: Any, position: Any, checkpoints: Any) -> Any:
        if position.step == first:
            torch.cuda.synchronize()
            profiler.start()
        result = take_step(trainer, position, checkpoints)
        if position.step == first + PROFILED - 1:
            torch.cuda.synchronize()
            profiler.stop()
            events = [e for e in profiler.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
            kernels = [(e.name, e.time_range.start, e.time_range.end) for e in events]
            file.write_text(json.dumps({"milliseconds": shares(kernels), "slowest": slowest(kernels)}))
        return result

    loop.take_step = step


if __name__ == "__main__":
    file, first, *sys.argv[1:] = sys.argv[1:]
    if rank() == 0:
        profiled(Path(file), int(first))
    sys.exit(main())
