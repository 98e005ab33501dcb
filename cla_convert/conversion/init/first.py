"""Shared projections are the owner's own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..initialisation import INITIALISATIONS, Pooling

if TYPE_CHECKING:
    from torch import Tensor


def first(members: "Sequence[Tensor]") -> "Tensor":
    """The owner's own tensor, unchanged."""
    return members[0]


INITIALISATIONS.register(Pooling("first", "keep the owner's projections.", first))
