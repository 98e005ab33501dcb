"""What the arithmetic runs in: float32, or bfloat16 autocast over float32 master weights."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from ..environment import has_native_bfloat16


@dataclass(frozen=True)
class Precision:
    """Compute dtype on a device. Weights and optimiser state are float32 in any case."""

    device_type: str
    compute: torch.dtype

    @property
    def name(self) -> str:
        """`float32` or `bfloat16`."""
        return str(self.compute).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[object]:
        """Context for the student's forward pass and the loss."""
        if self.compute is torch.float32:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.compute)


def choose_precision(wanted: Literal["auto", "bfloat16", "float32"], device: str) -> Precision:
    """`auto` takes bfloat16 where the hardware multiplies it natively; emulated, it is slower than float32."""
    device_type = torch.device(device).type
    if wanted == "auto":
        wanted = "bfloat16" if has_native_bfloat16(device_type) else "float32"
    return Precision(device_type, getattr(torch, wanted))
