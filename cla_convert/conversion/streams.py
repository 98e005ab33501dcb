"""Activations of the calibration tokens: where they are kept, and how they are visited in batches of rows.

Where several devices compute, each has a share of the rows of every stream: the first rows are the first device's.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..console import human_bytes, say
from ..environment import available_memory
from ..models.writer import disk_full_is_an_input_error

_GPU_SHARE = 0.6
"""Of what is free on a GPU, what streams may take."""


@dataclass(frozen=True)
class Part:
    """Some rows of a stream."""

    device: int
    """Number of the device whose share they are of."""
    rows: slice
    """Within the share."""


@dataclass(frozen=True)
class Stream:
    """A tensor [rows, T, ...], divided by rows: a share for each device."""

    shares: Sequence[Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return sum(map(len, self.shares)), *self.shares[0].shape[1:]

    def __getitem__(self, part: Part) -> Tensor:
        return self.shares[part.device][part.rows]

    def __setitem__(self, part: Part, values: Tensor) -> None:
        share = self.shares[part.device]
        share[part.rows] = values.to(share.dtype).to(share.device)  # in this order: it moves half as much

    def copy_(self, other: "Stream") -> None:
        """Take the values of another one that is divided alike."""
        for mine, theirs in zip(self.shares, other.shares, strict=True):
            mine.copy_(theirs)

    def rows(self, chosen: Tensor, device: torch.device) -> Tensor:
        """Any rows (int64, on the CPU) on one device, share after share."""
        starts = [0]
        for share in self.shares:
            starts.append(starts[-1] + len(share))
        found = []
        for start, end, share in zip(starts, starts[1:], self.shares, strict=False):
            if len(here := chosen[(chosen >= start) & (chosen < end)] - start):
                found.append(share[_sent(here, share.device)].to(device))
        return torch.cat(found) if len(found) > 1 else found[0]


def _sent(index: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU's on another device, without waiting for what that is doing."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)


def divided(rows: Tensor, devices: int) -> Stream:
    """Rows where they are, in even shares."""
    return Stream(rows.tensor_split(devices))


@dataclass(frozen=True)
class Store:
    """Allocates streams on the devices that compute if they fit, else in memory, or in files under `spill`."""

    places: Sequence[torch.device]
    """One for each share."""
    spill: Path | None = None
    dtype: torch.dtype = torch.float32
    """Of residual streams."""

    @classmethod
    def choose(cls, devices: Sequence[torch.device], nbytes: int, spill: Path | None = None) -> "Store":
        """A store for about `nbytes` of streams in all; in `spill` if `places_for` finds no other place."""
        places = places_for(devices, nbytes)
        if places is None and spill:
            say(f"activations: {human_bytes(nbytes)} would fill the memory, so they are kept on the disk of {spill}")
        elif devices[0].type == "cuda" and places != list(devices):
            say(
                f"activations: {human_bytes(nbytes)} are over {_GPU_SHARE:.0%} of what is free on the GPU, so they "
                "are kept in main memory, which takes many times as long (fewer: convert.calibration.tokens)"
            )
        memory = [torch.device("cpu")] * len(devices)
        return cls(places or memory, None if places else spill, stream_dtype(devices[0]))

    def empty(self, rows: int, *shape: int, dtype: torch.dtype | None = None) -> Stream:
        """An uninitialised stream. A file is removed from its folder at once; its space is freed with the tensor.

        Raises:
            InputError: the disk is full.
        """
        shares = (len(part) for part in torch.empty(rows, 0).tensor_split(len(self.places)))
        each = zip(shares, self.places, strict=True)
        return Stream([self._empty(place, count, *shape, dtype=dtype or self.dtype) for count, place in each])

    def whole(self, *shape: int, dtype: torch.dtype | None = None) -> Stream:
        """An uninitialised stream of a single share, the first device's."""
        return replace(self, places=self.places[:1]).empty(*shape, dtype=dtype)

    def _empty(self, place: torch.device, *shape: int, dtype: torch.dtype) -> Tensor:
        if self.spill is None:
            return torch.empty(*shape, dtype=dtype, device=place)
        count = torch.Size(shape).numel()
        with tempfile.NamedTemporaryFile(dir=self.spill, prefix=".activations-") as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk would kill the process when it writes to the map
                with disk_full_is_an_input_error(self.spill):
                    os.posix_fallocate(file.fileno(), 0, max(1, count * dtype.itemsize))
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(*shape)


def stream_dtype(device: torch.device) -> torch.dtype:
    """What residual streams are kept in: bfloat16 on a GPU, as models run there, and twice the text fits; else float32.

    The arithmetic on them is float32 everywhere.
    """
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def places_for(devices: Sequence[torch.device], nbytes: int) -> list[torch.device] | None:
    """Where the shares of `nbytes` of streams in all may live: on GPUs (0.6 of what is free), in memory (half), or not.

    The rest is for the layers.
    """
    each = nbytes / len(devices)
    if all(one.type == "cuda" and each <= _GPU_SHARE * _free(one) for one in devices):
        return list(devices)
    if devices[0].type not in ("cuda", "cpu"):
        return list(devices)  # shares the memory of the host
    return [torch.device("cpu")] * len(devices) if nbytes <= available_memory() // 2 else None


def _free(gpu: torch.device) -> int:
    """Bytes of a GPU that are free, or kept by torch of what was freed: a search before has left it much."""
    kept = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    return torch.cuda.mem_get_info(gpu)[0] + kept


def batches(stream: Stream, tokens: int) -> Iterator[Part]:
    """Parts of a stream [rows, T, ...] of about `tokens` tokens each (one row at least); devices take turns.

    So that each has work while the next is given its own.
    """
    step = max(1, tokens // stream.shape[1])
    for start in range(0, max(map(len, stream.shares)), step):
        for device, share in enumerate(stream.shares):
            if start < len(share):
                yield Part(device, slice(start, min(start + step, len(share))))


class SecondMoment:
    """Accumulates E[a b^T] over tokens: float32 products of one batch, summed in float64 on each device."""

    def __init__(self) -> None:
        self._sums: dict[torch.device, Tensor] = {}
        self._count = 0

    def add(self, left: Tensor, right: Tensor, weight: Tensor | None = None) -> None:
        """Add tokens [..., a] and [..., b], each weighted by `weight` [...]."""
        left, right = left.float().flatten(0, -2), right.float().flatten(0, -2)
        self._count += left.shape[0]
        if weight is not None:
            left = left * weight.flatten()[:, None]
        product = (left.T @ right).double()
        before = self._sums.get(product.device)
        self._sums[product.device] = product if before is None else before + product

    @property
    def value(self) -> Tensor:
        """The mean so far, float64 [a, b], on the first device."""
        assert self._sums, "no tokens were added"
        first, *others = self._sums.values()
        return sum((other.to(first.device) for other in others), first) / self._count
