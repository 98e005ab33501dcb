"""Shared projections fitted to what the source model computes on a little text (docs/how-it-works.md)."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ...effort import Effort
from ...models.checkpoint import Checkpoint
from ...models.families import Family
from ...models.shape import owners_of, shape_of
from ..initialisation import INITIALISATIONS, CalibrationText, Initialisation, LayerPatch
from ..sharing import groups_of, matched_groups
from ..tensor_plan import TensorPlan


class Calibrated(Initialisation):
    """Closed form and block reconstruction of every group, refit of every output projection."""

    name = "calibrated"
    summary = "fit the shared projections to the source model's activations on a little text (docs/how-it-works.md)."
    needs_text = True

    def fitted(self, family: Family) -> tuple[str, ...]:
        """Everything in the attention."""
        return family.attention_modules

    def working_bytes(
        self, checkpoint: Checkpoint, family: Family, sources: list[int | None], tensors: list[TensorPlan]
    ) -> int:
        """A layer in float32 and bfloat16; or the attention of a group, 36 bytes a parameter.

        That is its closed form in float64 with the second moments of its inputs, as measured where hidden_size is 4096.
        """
        layers, attention = Counter[int](), Counter[int]()
        for name, info in checkpoint.tensors.items():
            if place := family.place(name):
                layers[place.layer] += info.numel
                attention[place.layer] += info.numel * bool(place.module)
        alone = any(tensor.heads > 1 for tensor in tensors)  # a layer alone is pooled, too
        groups = (sum(attention[layer] for layer in group) for group in groups_of(sources) if len(group) > 1 or alone)
        return max(6 * max(layers.values()), 36 * max(groups, default=0))

    def patches(
        self,
        checkpoint: Checkpoint,
        sources: list[int | None],
        kv_heads: int,
        text: CalibrationText | None,
        spill: Path,
    ) -> Iterator[LayerPatch]:
        """One for every layer; none where no layer and no head shares."""
        shape = shape_of(checkpoint.config)
        if owners_of(sources) == shape.kv_layers and kv_heads == shape.num_key_value_heads:
            return iter(())
        from ..calibration import calibrated_pooling

        assert text is not None, "init: calibrated needs calibration text"
        return calibrated_pooling(
            checkpoint, checkpoint.config, sources, text.tokens, device=text.device, seed=text.seed,
            effort=_effort(text), spill=spill, kv_heads=kv_heads,
        )  # fmt: skip

    def steps(self, sources: list[int | None], text: CalibrationText | None, *, every: bool = False) -> int:
        """Those of block reconstruction, of every group from the first that shares on."""
        return _effort(text).steps * matched_groups(sources, every=every) if text else 0


def _effort(text: CalibrationText) -> Effort:
    effort = Effort.for_text(text.tokens.numel(), text.first_device)
    return effort if text.steps is None else replace(effort, steps=text.steps)


INITIALISATIONS.register(Calibrated())
