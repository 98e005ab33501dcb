"""An initialisation that brings patches of its own: owners' values are zeros."""

from collections.abc import Iterator
from pathlib import Path

from cla_convert.conversion.initialisation import INITIALISATIONS, CalibrationText, Initialisation, LayerPatch
from cla_convert.conversion.tensor_plan import TensorPlan
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.families import Family, family_of


class Zeros(Initialisation):
    name, summary = "zeros", "values are zeros."

    def fitted(self, family: Family) -> tuple[str, ...]:
        return ("k_proj", "v_proj")

    def working_bytes(
        self, checkpoint: Checkpoint, family: Family, sources: list[int | None], tensors: list[TensorPlan]
    ) -> int:
        return 0

    def patches(
        self,
        checkpoint: Checkpoint,
        sources: list[int | None],
        kv_heads: int,
        text: CalibrationText | None,
        spill: Path,
    ) -> Iterator[LayerPatch]:
        for layer in range(len(sources)):
            name = family_of(checkpoint.config).tensor(layer, "v_proj")
            yield LayerPatch(layer, {name: checkpoint.read(name).float() * 0})


INITIALISATIONS.register(Zeros())
