"""What a plan says of one tensor."""

from dataclasses import dataclass, replace

from ..models.headers import TensorInfo


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
    dtype: str | None = None
    """safetensors' name of the dtype that it is written in; None: the one that it has."""

    def written(self, stored: TensorInfo) -> TensorInfo:
        """The tensor as it will be, of the source's own."""
        shape = stored.shape if self.heads == 1 else (stored.shape[0] // self.heads, *stored.shape[1:])
        return replace(stored, shape=shape, dtype=self.dtype or stored.dtype)
