"""Activations of the calibration tokens: where they are kept, and how they are visited in batches of rows."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Store:
    """Allocates streams [rows, ...] on the compute device if they fit, else in memory, or in files under `spill`."""

    device: torch.device
    spill: Path | None = None

    @classmethod
    def choose(cls, device: str, nbytes: int, spill: Path | None = None) -> "Store":
        """A store for about `nbytes` of streams in all; a third of the accelerator's free memory may go to them."""
        chosen = torch.device(device)
        if spill is not None or (chosen.type == "cuda" and nbytes > torch.cuda.mem_get_info(chosen)[0] // 3):
            chosen = torch.device("cpu")
        return cls(chosen, spill)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised stream. A file is removed from its folder at once; its space is freed with the tensor."""
        if self.spill is None:
            return torch.empty(*shape, dtype=dtype, device=self.device)
        with tempfile.NamedTemporaryFile(dir=self.spill) as file:
            count = torch.Size(shape).numel()
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(*shape)


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
