"""What fits into a given memory: the largest batch and the longest context, by allocating and searching."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..errors import InputError
from .subject import Subject, cache_bytes, decode, filled_cache, release

STEPS = 2
"""Decoding steps that a cache must survive to count as fitting."""
UNIT = 64
"""The longest context is found to within so many tokens."""
TOLERANCE = 0.01
"""On a device that refuses, where every try costs seconds, the search stops this close to the answer."""
LIMIT = 2**24
"""Where a search gives up: a model of sliding windows only takes any length."""
CPU_CACHE = 2**30
"""Room for the cache on a CPU unless the user gives a budget: large enough to measure, small enough to be quick."""


@dataclass(frozen=True)
class MemoryBudget:
    """The memory that each model has to itself; the other model's weights lie beside it and do not count."""

    bytes: int
    device: str

    @property
    def enforced(self) -> bool:
        """Whether the device itself refuses what does not fit."""
        return self.device.startswith("cuda")

    @property
    def meaning(self) -> str:
        """What is counted against the budget, for the report."""
        if self.enforced:
            return (
                "for all that torch allocates on the device: weights, cache, activations of decoding. Allocations "
                "beyond it really fail. The CUDA context comes on top."
            )
        return (
            "for weights and live cache tensors. They are allocated and counted; activations are not, because a CPU "
            "does not refuse what is too much."
        )

    @contextmanager
    def cap(self, others: int) -> Iterator[None]:
        """Make allocations beyond the budget and the `others` bytes that are not this model's fail, if possible."""
        if not self.enforced:
            yield
            return
        index = torch.device(self.device).index
        index = torch.cuda.current_device() if index is None else index  # the allocator wants a number
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (self.bytes + others) / total), index)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, index)


def make_budget(wanted: int | None, device: str, weight_bytes: int, sequence: int) -> MemoryBudget:
    """The budget that was asked for; None: all free memory of a GPU, or the weights and 1 GiB on a CPU.

    Args:
        weight_bytes: of the larger model; both are loaded already.
        sequence: bytes that the cache of one sequence takes at most, for advice.

    Raises:
        InputError: there is not so much memory, or not even the weights fit.
    """
    available = weight_bytes + _free_bytes(device)
    budget = wanted or (available if device.startswith("cuda") else weight_bytes + CPU_CACHE)
    if budget > available:
        raise InputError(
            f"A budget of {size_text(budget)} is more than the {size_text(available)} that {device} can give",
            why="" if device.startswith("cuda") else "Half of what is free may be used: the search allocates beyond.",
            fix="Give a smaller --memory, or free some.",
        )
    if budget <= weight_bytes:
        raise InputError(
            f"The weights alone take {size_text(weight_bytes)}, more than the {size_text(budget)} for all",
            fix=f"Give more, for example --memory {size_text(weight_bytes + max(weight_bytes // 4, 8 * sequence))}.",
        )
    return MemoryBudget(budget, device)


def size_text(size: float) -> str:
    """A size as `--memory` takes it, not too small: two digits, rounded up. `320KB`, `1.1MB`, `20GB`."""
    for unit, number in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= number or unit == "KB":
            scaled = size / number
            digits = max(0, 1 - math.floor(math.log10(scaled))) if scaled > 0 else 0
            return f"{math.ceil(scaled * 10**digits) / 10**digits:g}{unit}"
    raise AssertionError


def fits(subject: Subject, budget: MemoryBudget, batch: int, length: int) -> bool:
    """Whether `batch` sequences of `length` tokens fit beside the weights: allocate them, and decode the last tokens.

    On a CPU, which swaps or kills instead of refusing, the live bytes are counted instead.
    """
    try:
        outcome = _allocate(subject, budget, batch, length)
    except torch.OutOfMemoryError:
        outcome = False
    release(subject.device, failed=not outcome)  # not before: until here the error holds the cache
    return outcome


def _allocate(subject: Subject, budget: MemoryBudget, batch: int, length: int) -> bool:
    if not budget.enforced:
        return subject.weight_bytes + cache_bytes(filled_cache(subject.model, batch, length)) <= budget.bytes
    steps = min(STEPS, length - 1)
    decode(subject.model, filled_cache(subject.model, batch, length - steps), batch, steps)
    return True


def capacity(subject: Subject, budget: MemoryBudget, length: int) -> dict[str, int]:
    """Largest batch at `length` tokens, and longest context of one sequence; 0 where not even one fits.

    Where memory is counted both are exact; where it is really filled they fit, and 1% more may fit too.
    """
    close = TOLERANCE if budget.enforced else 0.0
    batch_guess, context_guess = _guesses(subject, budget.bytes - subject.weight_bytes, length)
    batch = largest(lambda n: fits(subject, budget, n, length), batch_guess, tolerance=close)
    units = largest(lambda n: fits(subject, budget, 1, n * UNIT), context_guess // UNIT, tolerance=close)
    return {"largest_batch": batch, "longest_context": units * UNIT}


def _guesses(subject: Subject, room: int, length: int) -> tuple[int, int]:
    """Batch and context that the cache of one sequence suggests, so that the search starts close to the answer."""
    try:
        half, whole = (cache_bytes(filled_cache(subject.model, 1, n)) for n in (length // 2, length))
    except torch.OutOfMemoryError:
        return 0, 0
    growth = (whole - half) / (length - length // 2)
    return room // whole, round(room / growth) if growth else UNIT * LIMIT  # full windows do not grow


def largest(holds: Callable[[int], bool], guess: int, limit: int = LIMIT, tolerance: float = 0.0) -> int:
    """The largest n in 0..limit for which `holds`, given that it holds up to some n and not beyond.

    Starts at `guess` and doubles its steps until the answer lies between two tries; bisection does the rest. With a
    tolerance the answer holds, and is too small by at most that part of it.
    """
    first = max(1, int(guess * tolerance))
    low, high, step = 0, min(max(1, guess), limit), first
    while holds(high):
        if high == limit:
            return limit
        low, high, step = high, min(high + step, limit), 2 * step
    if not low:
        step = first
        while high > step and not holds(high - step):
            high, step = high - step, 2 * step
        low = max(0, high - step)
    while high - low > max(1, int(low * tolerance)):
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _free_bytes(device: str) -> int:
    """What may be allocated: all that is free on a GPU, half of what is available to a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available // 2
