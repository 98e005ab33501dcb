"""Among how many processes the student and the teacher of a training are divided."""

from dataclasses import dataclass, replace
from typing import Literal

from ..errors import UsageError
from ..recipe import Train


@dataclass(frozen=True)
class Layout:
    """How the processes of a training divide its models."""

    processes: int = 1
    shards: int = 1
    """Parts of the student's parameters, gradients and moments."""
    teacher_shards: int = 1
    """Parts of the teacher."""
    gathers_once: bool = False
    """Whether a step gathers the whole student and reduces its gradients once, and not in every pass."""

    @classmethod
    def of(cls, train: Train, processes: int, on_a_machine: int | None = None) -> "Layout":
        """That of a recipe, on so many processes of machines with so many each (None: it is one machine)."""
        return cls(processes, shards_of(train.shard_degree, processes, on_a_machine or processes))

    def with_teacher(self, *, divided: bool) -> "Layout":
        """The same with the teacher whole on every device, or divided as the student is."""
        return replace(self, teacher_shards=self.shards if divided else 1)


def shards_of(degree: int | Literal["all", "node"], processes: int, on_a_machine: int) -> int:
    """Parts that `train.shard_degree` means. Raises UsageError if the processes cannot be divided so."""
    shards = {"all": processes, "node": on_a_machine}.get(degree, degree) if isinstance(degree, str) else degree
    if not isinstance(shards, int) or processes % shards:
        raise UsageError(
            f"{processes} processes cannot be divided into groups of {shards}",
            f"train.shard_degree is {degree}; each group holds the whole model.",
            "Give a number that divides the processes, `node` (those of a machine) or `all`.",
        )
    return shards
