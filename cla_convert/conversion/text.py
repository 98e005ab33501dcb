"""The text that a conversion looks at."""

from collections.abc import Sequence
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
    device: str | Sequence[str] = "cpu"
    """Or several, which share the rows."""
    seed: int = 0
    steps: int | None = None
    """Of block reconstruction, per group; None: by device."""

    @property
    def first_device(self) -> str:
        """Where what happens once happens."""
        return self.device if isinstance(self.device, str) else self.device[0]
