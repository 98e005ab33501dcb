"""What happens to each tensor of a source."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ..models.checkpoint import Checkpoint
from ..models.families import Family
from ..models.headers import TensorInfo
from ..models.shape import AttentionShape
from .sharing import groups_of

_COMPUTED = "rotary_emb.inv_freq"
"""Ends the names of tensors that old checkpoints store and transformers computes."""


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


def plan_tensors(
    checkpoint: Checkpoint,
    family: Family,
    shape: AttentionShape,
    each: int,
    sources: Sequence[int | None],
    unused: Collection[str],
) -> list[TensorPlan]:
    """One entry per tensor of the source: first those outside the layers, then layer by layer.

    `each` KV heads become one, in what has rows for each head: the gain of a norm may have one for all.
    """
    rows = shape.projection_rows["k_proj"]
    groups = {group[0]: group for group in groups_of(sources)}
    tensors = []
    for name in checkpoint.tensors:
        place = family.place(name)
        layer = place.layer if place else None
        heads = each if checkpoint.tensors[name].shape[:1] == (rows,) else 1
        if name.endswith(_COMPUTED) or name in unused:
            tensors.append(TensorPlan(name, layer, "drop"))
        elif place is None or place.module not in family.kv_modules:
            tensors.append(TensorPlan(name, layer, "keep"))
        elif sources[place.layer] != place.layer:
            tensors.append(TensorPlan(name, layer, "drop"))
        elif len(groups[place.layer]) == heads == 1:
            tensors.append(TensorPlan(name, layer, "keep"))
        else:
            members = tuple(family.tensor(member, place.module, place.part) for member in groups[place.layer])
            tensors.append(TensorPlan(name, layer, "pool", members, heads))
    return sorted(tensors, key=lambda tensor: -1 if tensor.layer is None else tensor.layer)


def fitted(tensors: Sequence[TensorPlan], family: Family, first: int, modules: Collection[str]) -> list[TensorPlan]:
    """The same with the modules that an initialisation fits, in every layer from the first pooled one on."""

    def refit(tensor: TensorPlan) -> TensorPlan:
        place = family.place(tensor.name)
        changes = place is not None and place.layer >= first and place.module in modules
        return replace(tensor, action="fit") if changes and tensor.action != "drop" else tensor

    return [refit(tensor) for tensor in tensors]


def cast(tensors: Sequence[TensorPlan], dtype: str, kept: Collection[str]) -> list[TensorPlan]:
    """The same, written in `dtype` but for the tensors named in `kept`."""
    return [tensor if tensor.name in kept else replace(tensor, dtype=dtype) for tensor in tensors]
