"""The text that calibrated pooling looks at. Imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """What calibrated pooling looks at, and where it runs."""

    tokens: "Tensor"
    """int64 [rows, T]"""
    digest: str
    """Hash of the text they come from."""
    device: str = "cpu"
    seed: int = 0
    steps: int | None = None
    """Of matching, per group; None: by device."""
