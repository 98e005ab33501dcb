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
from .tensor_plan import TensorPlan

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CalibrationText:
    """What an initialisation that needs text looks at, and where it runs."""

    tokens: "Tensor"
    """int64 [rows, T]"""
    digest: str
    """Hash of the text they come from."""
    device: str | Sequence[str] = "cpu"
    """Or several, which share the rows."""
    seed: int = 0
    steps: int | None = None
    """Of block reconstruction, per group; None: by device."""

    @property
    def first_device(self) -> str:
        """Where what happens once happens."""
        return self.device if isinstance(self.device, str) else self.device[0]


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
