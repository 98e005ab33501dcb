"""Shared projections in weight space: keep the owner's, or average the group's.

Pooling is a function of one name and the tensors of its group, so a checkpoint of any size streams through it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Pool = Callable[[Sequence["Tensor"]], "Tensor"]


def first(members: Sequence["Tensor"]) -> "Tensor":
    """The owner's own tensor, unchanged."""
    return members[0]


def mean(members: Sequence["Tensor"]) -> "Tensor":
    """Equal-weight mean over the group in float32 (GQA, arXiv 2305.13245, section 2.1, across layers instead of heads).

    One sum divided once: averaging pairs in turn would weigh the last layer of a group of three by 1/2. The result has
    the members' dtype.
    """
    total = members[0].float()
    for member in members[1:]:
        total = total + member.float()
    return (total / len(members)).to(members[0].dtype)


WEIGHT_SPACE: dict[str, Pool] = {"first": first, "mean": mean}
