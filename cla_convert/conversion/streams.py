"""Activations of the calibration tokens: where they are kept, and how they are visited in batches of rows."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..console import human_bytes, say
from ..environment import available_memory
from ..models.writer import disk_full_is_an_input_error


@dataclass(frozen=True)
class Store:
    """Allocates streams [rows, ...] on the compute device if they fit, else in memory, or in files under `spill`."""

    device: torch.device
    spill: Path | None = None
    dtype: torch.dtype = torch.float32
    """Of residual streams."""

    @classmethod
    def choose(cls, device: str, nbytes: int, spill: Path | None = None) -> "Store":
        """A store for about `nbytes` of streams in all; in `spill` if `place_for` finds no other place."""
        place = place_for(device, nbytes)
        if place is None and spill:
            say(f"activations: {human_bytes(nbytes)} would fill the memory, so they are kept on the disk of {spill}")
        return cls(place or torch.device("cpu"), None if place else spill, stream_dtype(device))

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised stream. A file is removed from its folder at once; its space is freed with the tensor.

        Raises:
            InputError: the disk is full.
        """
        dtype = dtype or self.dtype
        if self.spill is None:
            return torch.empty(*shape, dtype=dtype, device=self.device)
        count = torch.Size(shape).numel()
        with tempfile.NamedTemporaryFile(dir=self.spill, prefix=".activations-") as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk would kill the process when it writes to the map
                with disk_full_is_an_input_error(self.spill):
                    os.posix_fallocate(file.fileno(), 0, max(1, count * dtype.itemsize))
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(*shape)


def stream_dtype(device: str) -> torch.dtype:
    """What residual streams are kept in: bfloat16 on a GPU, as models run there, and twice the text fits; else float32.

    The arithmetic on them is float32 everywhere.
    """
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def place_for(device: str, nbytes: int) -> torch.device | None:
    """Where streams of `nbytes` in all may live: the accelerator (0.6 of what is free), memory (half), or neither.

    The rest is for the layers.
    """
    chosen = torch.device(device)
    if chosen.type == "cuda" and nbytes <= 0.6 * torch.cuda.mem_get_info(chosen)[0]:
        return chosen
    if chosen.type not in ("cuda", "cpu"):
        return chosen  # shares the memory of the host
    return torch.device("cpu") if nbytes <= available_memory() // 2 else None


def batches(stream: Tensor, tokens: int) -> Iterator[slice]:
    """Slices of the rows of a stream [rows, T, ...] holding about `tokens` tokens each (at least one row)."""
    rows, step = stream.shape[0], max(1, tokens // stream.shape[1])
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class SecondMoment:
    """Accumulates E[a b^T] over tokens: float32 products of one batch, summed in float64."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, left: Tensor, right: Tensor, weight: Tensor | None = None) -> None:
        """Add tokens [..., a] and [..., b], each weighted by `weight` [...]."""
        left, right = left.float().flatten(0, -2), right.float().flatten(0, -2)
        self._count += left.shape[0]
        if weight is not None:
            left = left * weight.flatten()[:, None]
        product = (left.T @ right).double()
        self._sum = product if self._sum is None else self._sum + product

    @property
    def value(self) -> Tensor:
        """The mean so far, float64 [a, b]."""
        assert self._sum is not None, "no tokens were added"
        return self._sum / self._count
