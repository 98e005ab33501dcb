"""Whether training fits into the memory of a device, and how many sequences into one forward and backward pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from ..console import human_bytes
from ..environment import gpu_memory
from ..errors import InputError
from ..recipe import Train
from .layout import Layout
from .memory import CONTEXT, Forecast

_CPU_ROWS = 8
_ENOUGH_TOKENS = 32_768
"""In a pass; more do not make a GPU faster."""
_SPARE = 0.1
"""Of a GPU that a micro-batch chosen here leaves: blocks that the allocator cannot use, and errors of the forecast."""
_TEAMS = (2, 4, 8, 16)


def forecast(
    train: Train, student: Mapping[str, Any], teacher: Mapping[str, Any], device: str, layout: Layout
) -> tuple[Forecast, int]:
    """What training needs, and the sequences in a pass.

    Args:
        train: the recipe's section.
        student: config.json of the model to train.
        teacher: config.json of the model to distil from.
        device: `cpu`, `cuda`, ...
        layout: of the processes that train together.

    Raises:
        InputError: the device has too little memory; the error says what does fit.
    """
    layout = replace(layout, gathers_once=train.gather == "step" and layout.shards > 1)
    foreseen, total = Forecast(train, student, teacher, device, layout), device_memory(device)
    foreseen = foreseen.among(layout.with_teacher(divided=shards_teacher(foreseen, total)))
    rows = micro_batch_size(foreseen)
    once = foreseen.among(replace(foreseen.layout, gathers_once=True))
    if has_room_to_gather_once(once, rows, total):
        foreseen = once
    if total is not None and foreseen.needs(rows).peak + CONTEXT > total:
        raise _too_little(foreseen, rows, total)
    return foreseen, rows


def micro_batch_size(foreseen: Forecast) -> int:
    """Sequences in a pass: as the recipe says, or a power of two that the device holds; at most a whole batch.

    From the device's total memory, not what is free just now: the same run on the same machine gives the same bits.
    """
    wanted, most = foreseen.train.micro_batch_size, _share(foreseen)
    if wanted != "auto":
        return min(wanted, most)
    total = device_memory(foreseen.device)
    if total is None or not foreseen.device.startswith("cuda"):
        return min(_CPU_ROWS, most)
    enough = max(1, min(most, _ENOUGH_TOKENS // foreseen.budget.length))
    return foreseen.largest((1 - _SPARE) * total, enough) or 1


def shards_teacher(foreseen: Forecast, total: int | None) -> bool:
    """Whether the teacher is divided among the processes: as the recipe says, or where it does not fit whole."""
    wanted = foreseen.train.shard_teacher
    if foreseen.layout.shards == 1 or foreseen.teacher is None or wanted is False:
        return False
    fewest = 1 if foreseen.train.micro_batch_size == "auto" else foreseen.train.micro_batch_size
    return wanted is True or (total is not None and foreseen.needs(fewest).peak + CONTEXT > (1 - _SPARE) * total)


def has_room_to_gather_once(once: Forecast, rows: int, total: int | None) -> bool:
    """Whether a step gathers the model once where the recipe leaves that open: a GPU holds that with as many sequences.

    Args:
        once: the training if it does.
        rows: sequences in a pass if it does not.
        total: bytes that the device has.
    """
    if once.train.gather != "auto" or once.layout.shards == 1:
        return False
    if total is None or not once.device.startswith("cuda"):  # processes on CPUs share what `total` is of
        return False
    return once.needs(rows).peak + CONTEXT <= (1 - _SPARE) * total


def device_memory(device: str) -> int | None:
    """Bytes that a device has in all, within the limit of this process's container (cgroup v2); None if unknown."""
    if device != "cpu":
        return gpu_memory(device)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else ""
    total = psutil.virtual_memory().total + psutil.swap_memory().total
    return min(total, int(text)) if text.isdigit() else total


def advice(foreseen: Forecast, rows: int) -> str:
    """What else to set, where `rows` sequences a pass are too much: only what the forecast says will fit."""
    total = device_memory(foreseen.device)
    fits = [] if total is None else list(_what_fits(foreseen, rows, total))
    if fits:
        return f"What fits: {'; '.join(fits)}."
    return "Use a smaller model, a shorter train.sequence_length, or a device with more memory."


def ran_out(error: RuntimeError) -> bool:
    """Whether an allocator failed; torch has an error of its own for it on accelerators only."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def loading() -> Iterator[None]:
    """Turn an allocator's failure into an InputError: something else takes what the forecast counted on."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise InputError(
            "Memory ran out while the models were loaded",
            str(error).strip().splitlines()[0],
            "End what else is on the device, or use another one.",
        ) from error


def _too_little(foreseen: Forecast, rows: int, total: int) -> InputError:
    needs = foreseen.needs(rows)
    device = "GPU" if foreseen.device.startswith("cuda") else "machine"
    each = f" on each of {foreseen.layout.processes} processes" if foreseen.layout.processes > 1 else ""
    return InputError(
        f"Training needs about {human_bytes(needs.peak + CONTEXT)} of memory{each}, the {device} has "
        f"{human_bytes(total)}",
        f"With {rows} sequences of {foreseen.budget.length} tokens a pass: {needs}.",
        advice(foreseen, rows),
    )


def _what_fits(foreseen: Forecast, rows: int, total: int) -> Iterator[str]:
    """Settings that fit, the least change first; of the last resort only if nothing else does."""
    room, found = (1 - _SPARE) * total, False
    first: dict[str, Any] = {}
    if foreseen.layout.gathers_once:
        foreseen, first = foreseen.among(replace(foreseen.layout, gathers_once=False)), {"gather": "layer"}
    options: tuple[dict[str, Any], ...] = (
        {},
        {"activation_checkpointing": True},
        {"parameters": "attention"},
        {"parameters": "attention", "activation_checkpointing": True},
    )
    for changes in options:
        if found and len(changes) > 1:
            break
        other = foreseen.given(**changes)
        fit = other.largest(room, rows if changes or first else rows - 1)
        if fit and (changes or first or fit < rows):
            found = True
            named = {**first, **changes, **({"micro_batch_size": fit} if fit < rows else {})}
            words = " ".join(f"train.{name}={str(value).lower()}" for name, value in named.items())
            yield f"{words} ({human_bytes(other.needs(fit).peak + CONTEXT)})"
    yield from _teams(foreseen, rows, room, "".join(f" train.{name}={value}" for name, value in first.items()))


def _teams(foreseen: Forecast, rows: int, room: float, also: str) -> Iterator[str]:
    """The smallest number of GPUs that fits, with what is set also."""
    if not foreseen.device.startswith("cuda"):
        return
    for processes in _TEAMS:
        layout = Layout(processes, processes)
        other = foreseen.among(layout.with_teacher(divided=foreseen.train.shard_teacher is not False))
        if processes > foreseen.layout.shards and (fit := other.largest(room, rows)):
            size = f" train.micro_batch_size={fit}" if fit < rows else ""
            each = human_bytes(other.needs(fit).peak + CONTEXT)
            yield f"train.processes={processes}{also}{size} on as many GPUs ({each} each)"
            return


def _share(foreseen: Forecast) -> int:
    """Sequences of a step that one process takes."""
    return -(-foreseen.budget.batch // foreseen.layout.processes)
