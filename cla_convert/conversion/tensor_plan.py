"""What a plan says of one tensor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor of the source."""

    name: str
    layer: int | None
    action: str
    """keep, pool (with `members`), fit (on calibration text) or drop."""
    members: tuple[str, ...] = ()
    """Tensors to pool, the owner's first."""
    heads: int = 1
    """Heads of each tensor that become one."""
