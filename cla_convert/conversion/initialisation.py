"""What the shared projections start from: a registry. A new initialisation is one file in `init/`. Imports no torch.

Most are a function of the group's tensors, a `Pooling`. What needs more (text, other layers, new queries and outputs)
derives from `Initialisation` and yields patches.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.checkpoint import Checkpoint
from ..models.families import Family
from ..registry import Registry
from .layer_patch import LayerPatch
from .tensor_plan import TensorPlan
from .text import CalibrationText

if TYPE_CHECKING:
    from torch import Tensor


class Initialisation(ABC):
    """How the weights of a converted model come about."""

    name: str
    """Value of `convert.init`."""
    summary: str
    """What it does, for help texts."""
    needs_text: bool = False
    """Whether it looks at calibration text."""

    def fitted(self, family: Family) -> tuple[str, ...]:
        """Modules of the attention that patches bring, in every layer from the first shared one on; most: none."""
        return ()

    @abstractmethod
    def working_bytes(
        self, checkpoint: Checkpoint, family: Family, sources: list[int | None], tensors: list[TensorPlan]
    ) -> int:
        """Memory that it needs beside the program and the text's activations, for the plan."""

    def steps(self, sources: list[int | None], text: CalibrationText | None, *, every: bool = False) -> int:
        """Steps that `patches` takes, for a bar that counts them: each is told by `bars.tick("matching")`. 0: none.

        `every`: layers that share nothing change too, for they get fewer heads.
        """
        return 0

    def patches(
        self,
        checkpoint: Checkpoint,
        sources: list[int | None],
        kv_heads: int,
        text: CalibrationText | None,
        spill: Path,
    ) -> Iterator[LayerPatch]:
        """One patch per layer, in order; what they bring is written instead of what the plan says. Most bring none.

        Args:
            checkpoint: the source model.
            sources: the sharing map.
            kv_heads: what every layer of the converted model has.
            text: given where `needs_text`.
            spill: folder for what memory has no room for.
        """
        return iter(())

    def pool(self, members: "Sequence[Tensor]") -> "Tensor":
        """The owner's tensor, from those of its group (the owner's first), for what no patch brings.

        Where heads are pooled, a member is one head of each that become one: several members for every layer.
        """
        raise NotImplementedError(f"init: {self.name} pools no tensors")


INITIALISATIONS: Registry[Initialisation] = Registry("initialisation", f"{__package__}.init")


@dataclass(frozen=True)
class Pooling(Initialisation):
    """In weight space: a function of one name and the tensors of its group, so a checkpoint of any size streams by."""

    name: str
    summary: str
    function: "Callable[[Sequence[Tensor]], Tensor]"
    """Of the group's members, the owner's first; the result has their shape and dtype."""

    def working_bytes(
        self, checkpoint: Checkpoint, family: Family, sources: list[int | None], tensors: list[TensorPlan]
    ) -> int:
        """The members of one tensor, as stored and in float32, and what they give."""
        return max((sum(checkpoint.tensors[m].numel for m in t.members) * 10 for t in tensors), default=0)

    def pool(self, members: "Sequence[Tensor]") -> "Tensor":
        """The function's result."""
        return self.function(members)
