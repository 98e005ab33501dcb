"""What training minimises: a registry. A new loss is one file in `losses/`. Imports no torch.

A loss is made of weighted terms over the vocabulary. A term is a function of a chunk of logits; those that ship write
out their gradient (loss.py), others leave that to autograd.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


class Chunk(NamedTuple):
    """Some positions with their logits, float32 [n, V] each, as the models define them."""

    logits: "Tensor"
    """Of the model in training."""
    teacher: "Tensor | None"
    """Of the teacher; None without one."""
    labels: "Tensor"
    """[n], the next token; where there is none, IGNORE of loss.py."""
    counted: "Tensor"
    """bool [n]: positions that count."""
    temperature: float
    """`train.temperature`."""


class Term(Protocol):
    """A part of a loss."""

    @property
    def name(self) -> str:
        """In metrics.jsonl."""
        ...

    @property
    def fusible(self) -> bool:
        """Whether torch.compile can take it as one graph."""
        ...

    def __call__(self, chunk: Chunk, weight: float) -> "tuple[Tensor, Tensor]":
        """The sum over the counted positions, without the weight, and `weight` times its gradient [n, V]."""
        ...


@dataclass(frozen=True)
class ByAutograd:
    """A term whose gradient autograd finds."""

    name: str
    each: "Callable[[Chunk], Tensor]"
    """The loss of every position, [n], differentiable in `chunk.logits`."""
    fusible = False

    def __call__(self, chunk: Chunk, weight: float) -> "tuple[Tensor, Tensor]":
        """See `Term`."""
        import torch

        with torch.enable_grad():
            logits = chunk.logits.detach().requires_grad_()
            total = self.each(chunk._replace(logits=logits)).where(chunk.counted, 0.0).sum()
            (gradient,) = torch.autograd.grad(total, logits)
        return total.detach(), gradient.mul_(weight)


class LossSettings(Protocol):
    """What terms may depend on, of the recipe's section `train`."""

    @property
    def cross_entropy_weight(self) -> float:
        """`train.cross_entropy_weight`."""
        ...


class TrainLoss(ABC):
    """A value of `train.loss`."""

    name: str
    summary: str
    """What it does, for help texts."""
    needs_teacher: bool
    """Whether it pulls the model towards a teacher. If so, residual streams are matched too (`train.hidden_weight`),
    attention alone learns at the full rate, and the source distilled from itself is at its goal."""

    @abstractmethod
    def terms(self, settings: LossSettings) -> "Sequence[tuple[Term, float]]":
        """Its terms and their weights, those of weight 0 too."""


LOSSES: Registry[TrainLoss] = Registry("loss", f"{__package__}.losses")
