"""Fewer KV heads in a layer: several of the source's become one, as in GQA (arXiv 2305.13245). Imports no torch.

Sharing between layers and pooling heads are one step: a shared head takes as many heads from every layer of its group.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import InputError, UsageError
from ..models.families import Family
from ..models.shape import AttentionShape

if TYPE_CHECKING:
    from torch import Tensor


def possible_heads(shape: AttentionShape) -> list[int]:
    """Numbers of KV heads, fewer than the model has, that its heads can be pooled into."""
    heads = shape.num_key_value_heads
    return [count for count in range(1, heads) if heads % count == 0]


def check_kv_heads(kv_heads: int | None, family: Family, shape: AttentionShape) -> int:
    """The number of KV heads that the converted model will have; None stands for the source's.

    Raises:
        UsageError: the model's heads cannot be pooled into so many.
        InputError: no model of the family can have fewer.
    """
    has = shape.num_key_value_heads
    if kv_heads is None or kv_heads == has:
        return has
    possible = possible_heads(shape)
    if kv_heads not in possible:
        raise UsageError(
            f"The model's {has} KV head{'s' * (has > 1)} cannot become {kv_heads}",
            why="Every shared head takes as many heads of each layer as the others, so the number must divide theirs.",
            fix=f"Give {'one of ' * (len(possible) > 1)}{', '.join(map(str, possible))}, "
            "or leave convert.kv_heads (--kv-heads) out."
            if possible
            else "Leave convert.kv_heads (--kv-heads) out: there is nothing to pool.",
        )
    from ..models.classes import cla_classes

    if not hasattr(cla_classes(family)["Config"], family.key("num_key_value_heads")):
        raise InputError(
            f"Models of type {family.model_type!r} have as many KV heads as query heads",
            why="Their code in transformers knows no other number.",
            fix="Leave convert.kv_heads (--kv-heads) out: layers can share all the same.",
        )
    return kv_heads


def adjacent(tensor: "Tensor", kv_heads: int, each: int) -> "list[Tensor]":
    """`each` tensors of `kv_heads` heads: the first, second, ... of every run of adjacent heads that become one."""
    parts = tensor.unflatten(0, (kv_heads, each, -1)).unbind(1)
    return [part.flatten(0, 1) for part in parts]


def adjacent_groups(kv_heads: int, each: int) -> list[list[int]]:
    """Which heads those are: `adjacent_groups(2, 2)` -> `[[0, 1], [2, 3]]`."""
    return grouped(range(kv_heads * each), each)


def grouped(order: Sequence[int], each: int) -> list[list[int]]:
    """Runs of `each`."""
    return [list(order[start : start + each]) for start in range(0, len(order), each)]
