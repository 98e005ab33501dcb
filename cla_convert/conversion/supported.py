"""Whether a model can be converted, from headers alone: `inspect` tells it, a plan insists on it."""

import re
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError, first_line
from ..models.checkpoint import Checkpoint
from ..models.families import Family, family_of
from ..models.kinds import FULL, NOPE, SLIDING, STATES
from ..models.packed import refuse_packed, refuse_scales
from ..models.shape import AttentionShape, shape_of

_MTP = re.compile(r"(model\.)?mtp[._]")


class Convertible(NamedTuple):
    """What is known of a model that can be converted."""

    family: Family
    shape: AttentionShape
    unused: set[str]
    """Tensors that its class has no place for."""
    ahead: frozenset[str] = frozenset()
    """Those of them that guess tokens further ahead."""


def check_convertible(checkpoint: Checkpoint) -> Convertible:
    """The model's family, the shape of its attention, and what the checkpoint holds beside the model.

    Raises:
        InputError: the family is not supported, the weights are quantised, or they are not what config.json describes.
    """
    family, shape = family_of(checkpoint.config), shape_of(checkpoint.config)
    if unknown := {kind.removesuffix(NOPE) for kind in shape.kinds} - {
        FULL,
        SLIDING,
        *(STATES if family.state else ()),
    }:
        raise InputError(
            f"The model has layers of the kind {min(unknown)!r}",
            why=f"The CLA code of {family.model_type!r} knows {FULL} and {SLIDING} only.",
        )
    if not shape.kv_layers:
        raise InputError("No layer of the model has attention", why="So it has no KV cache to make smaller.")
    if named := checkpoint.config.get("transformers_weights"):
        raise InputError(
            f"config.json names other weights: {named!r}",
            why="With transformers_weights, transformers loads that file and not the usual ones.",
            fix="Load the model with transformers and save it again, then convert that.",
        )
    _check_generation(checkpoint.folder)
    refuse_packed(checkpoint.config, checkpoint.tensors)
    files = {info.file for info in checkpoint.tensors.values()}
    if ggufs := [file for file in files if file.endswith(".gguf")]:  # tensors have other names until dequantised
        from ..models.gguf_source import check

        check(checkpoint.folder / ggufs[0])
        return Convertible(family, shape, set())
    if checkpoint.around:
        from ..models.fit import check_whole

        check_whole(checkpoint.around, checkpoint.as_stored(checkpoint.whole or checkpoint.tensors))
    ahead = _predicting_ahead(checkpoint, family, shape)
    _check_layers(checkpoint, family, shape, ahead)
    unused = ahead | _unused(checkpoint, family, ahead)
    refuse_scales(unused, checkpoint.tensors)
    return Convertible(family, shape, unused, frozenset(ahead))


def _check_generation(folder: Path) -> None:
    """The output has this file, too, and transformers loads no model with one that it refuses."""
    from transformers import GenerationConfig

    from ..models.export import quietly

    if not (folder / "generation_config.json").exists():
        return
    try:
        with quietly():
            GenerationConfig.from_pretrained(folder)
    except Exception as error:  # each of its settings has checks of its own
        raise InputError(
            f"transformers refuses generation_config.json in {folder}",
            why=first_line(error),
            fix="Correct that file, or take it away: then the model generates by what config.json says.",
        ) from error


def _predicting_ahead(checkpoint: Checkpoint, family: Family, shape: AttentionShape) -> set[str]:
    """Tensors that guess tokens further ahead: layers behind the last (GLM-4 MoE), or `mtp` (Qwen3-Next, ERNIE 4.5).

    transformers leaves them out.
    """
    count = checkpoint.config.get("num_nextn_predict_layers")
    ahead = range(shape.num_layers, shape.num_layers + (count if isinstance(count, int) else 0))
    places = {name: family.place(name) for name in checkpoint.tensors}
    return {name for name, place in places.items() if _MTP.match(name) or (place and place.layer in ahead)}


def _unused(checkpoint: Checkpoint, family: Family, ahead: set[str]) -> set[str]:
    from ..models.fit import unused_tensors

    stored = checkpoint.whole or checkpoint.tensors
    unused = unused_tensors(checkpoint.config, {name: info for name, info in stored.items() if name not in ahead})
    split = unused - checkpoint.tensors.keys()
    places = {name: place for name in split if (place := family.place(name)) and place.module == family.fused}
    for name, place in places.items():  # shown to all others as three
        unused |= {family.tensor(place.layer, module, place.part) for module in ("q_proj", "k_proj", "v_proj")}
        unused.remove(name)
    return unused


def _check_layers(checkpoint: Checkpoint, family: Family, shape: AttentionShape, ahead: set[str]) -> None:
    """Every layer has the q, k and v that config.json describes, so that any two can be pooled; there are no others."""
    for layer in shape.kv_layers:
        for module, rows in shape.projection_rows.items():
            info = checkpoint.tensors.get(family.tensor(layer, module))
            if info is None:
                raise InputError(
                    f"Layer {layer} has no {module}.weight",
                    why=_why_missing(checkpoint, family.tensor(layer, module), shape.model_type),
                    fix="Check that the checkpoint is whole and that config.json belongs to it.",
                )
            found = info.shape[0] if info.shape else 0
            if found != rows:
                raise InputError(
                    f"{family.tensor(layer, module)} has {found} rows where config.json promises {rows}",
                    fix="Check that config.json belongs to the weights.",
                )
    places = filter(None, (family.place(name) for name in checkpoint.tensors if name not in ahead))
    if extra := {place.layer for place in places if place.layer >= shape.num_layers}:
        raise InputError(
            f"The checkpoint has a layer {max(extra)} where config.json promises {shape.num_layers} layers",
            fix="Check that config.json belongs to the weights.",
        )


def _why_missing(checkpoint: Checkpoint, name: str, model_type: str) -> str:
    """A prefix that a wrapper gave to all names (torch.compile, DDP, PEFT), if that is it."""
    end = name.partition(".")[2]
    if found := next((stored for stored in checkpoint.tensors if stored.endswith(end) and stored != name), None):
        return (
            f"It is stored as {found!r}: the model was saved inside a wrapper (torch.compile, DDP, PEFT), and "
            "transformers would not find its weights either."
        )
    return f"A {model_type} checkpoint has one in every layer with attention."
