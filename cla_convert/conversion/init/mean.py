"""Shared projections are the mean over the group: GQA's way (arXiv 2305.13245), and CLA's."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..initialisation import INITIALISATIONS, Pooling

if TYPE_CHECKING:
    from torch import Tensor


def mean(members: "Sequence[Tensor]") -> "Tensor":
    """Equal-weight mean over the group in float32 (GQA, arXiv 2305.13245, section 2.1, across layers instead of heads).

    One sum divided once: averaging pairs in turn would weigh the last layer of a group of three by 1/2. The result has
    the members' dtype.
    """
    total = members[0].float()
    for member in members[1:]:
        total = total + member.float()
    return (total / len(members)).to(members[0].dtype)


INITIALISATIONS.register(Pooling("mean", "equal-weight mean over the group, in float32 (GQA's and CLA's way).", mean))
