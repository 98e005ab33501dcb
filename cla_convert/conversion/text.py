"""The text that a conversion looks at."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CalibrationText:
    """What an initialisation that needs text looks at, and where it runs."""

    tokens: "Tensor"
    """int64 [rows, T]"""
    digest: str
    """Hash of the text they come from."""
    device: str = "cpu"
    seed: int = 0
    steps: int | None = None
    """Of block reconstruction, per group; None: by device."""
