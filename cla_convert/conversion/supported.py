"""Whether a model can be converted, from headers alone: `inspect` tells it, a plan insists on it."""

from ..errors import InputError
from ..models.checkpoint import FLOATING, Checkpoint
from ..models.families import Family, family_of
from ..models.kinds import FULL, NOPE, SLIDING
from ..models.shape import AttentionShape, shape_of


def check_convertible(checkpoint: Checkpoint) -> tuple[Family, AttentionShape]:
    """The model's family and the shape of its attention.

    Raises:
        InputError: the family is not supported, the weights are quantised, or they are not what config.json describes.
    """
    family, shape = family_of(checkpoint.config), shape_of(checkpoint.config)
    if unknown := {kind.removesuffix(NOPE) for kind in shape.kinds} - {FULL, SLIDING}:
        raise InputError(
            f"The model has layers of the kind {min(unknown)!r}",
            why=f"The CLA code of {family.model_type!r} knows {FULL} and {SLIDING} only.",
        )
    infos = checkpoint.tensors.values()
    if "quantization_config" in checkpoint.config or any(info.dtype not in FLOATING for info in infos):
        raise InputError(
            "The model's weights are quantised",
            why="Packed numbers cannot be pooled or fitted.",
            fix="Use the unquantised checkpoint of this model, or a GGUF file, which is dequantised.",
        )
    if not any(info.file.endswith(".gguf") for info in infos):  # there, tensors have other names until dequantised
        _check_layers(checkpoint, family, shape)
    return family, shape


def _check_layers(checkpoint: Checkpoint, family: Family, shape: AttentionShape) -> None:
    """Every layer has the q, k and v that config.json describes, so that any two can be pooled; there are no others."""
    for layer in range(shape.num_layers):
        for module, rows in shape.projection_rows.items():
            info = checkpoint.tensors.get(family.tensor(layer, module))
            if info is None:
                raise InputError(
                    f"Layer {layer} has no {module}.weight",
                    why=f"A {shape.model_type} checkpoint has one in every layer.",
                    fix="Check that the checkpoint is whole and that config.json belongs to it.",
                )
            found = info.shape[0] if info.shape else 0
            if found != rows:
                raise InputError(
                    f"{family.tensor(layer, module)} has {found} rows where config.json promises {rows}",
                    fix="Check that config.json belongs to the weights.",
                )
    places = filter(None, map(family.place, checkpoint.tensors))
    if extra := {place.layer for place in places if place.layer >= shape.num_layers}:
        raise InputError(
            f"The checkpoint has a layer {max(extra)} where config.json promises {shape.num_layers} layers",
            fix="Check that config.json belongs to the weights.",
        )
