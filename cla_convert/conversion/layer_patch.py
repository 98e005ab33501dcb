"""What an initialisation changes in one layer, and what it found out about the groups."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GroupFit:
    """What calibration found out about one sharing group."""

    layers: tuple[int, ...]
    head_permutation: dict[int, tuple[int, ...]]
    """Per layer: which of its KV heads sits on each shared head."""
    captured_k: float
    """Share of the query-weighted key energy that the closed form keeps."""
    captured_v: float
    """Share of the W_O-weighted value energy that the closed form keeps."""
    mismatch: float
    """Relative squared error of the members' normed post-attention residual on calibration text, at the end."""
    temperature_error: float | None
    """Families with norms on queries and keys: what of the closed form does not fold, in nats on tokens that were
    not fitted (see `norms`)."""


@dataclass(frozen=True)
class LayerPatch:
    """What changes in one layer: full checkpoint names -> float32 values on the CPU. Anything absent stays."""

    layer: int
    tensors: "dict[str, Tensor]"
    fit: GroupFit | None = None
    """On the owner of a shared group."""
