"""The supported families by name, and the family of a config.json. Imports no torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import kinds
from .family import CODE_FOLDER as CODE_FOLDER
from .family import Family
from .family_rows import ROWS
from .nearest import nearest_family, obstacles
from .refused import REFUSED as REFUSED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = {family.model_type: family for family in ROWS}


def as_transformers_reads(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the `model_type` that transformers loads it as: Mistral with `layer_types` is Ministral."""
    if config.get("model_type") == "mistral" and "layer_types" in config:
        return {**config, "model_type": "ministral"}
    return config


def without_strays(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A config.json of a source or an output without the windows that its family has not, and their keys.

    Attention of such a family sees everything before it, in training and wherever whole texts are scored; but
    transformers' caches go by the key alone and forget what lies behind the window, so `generate` would go on with
    something else than the model's own answer.
    """
    family = FAMILIES.get(str(config.get("model_type")).removeprefix("cla_"))
    found = kinds.strays(family.kinds, config) if family else []
    return {key: value for key, value in config.items() if key not in found}, found


def family_like(model_type: str) -> Family:
    """The family of a plain or CLA model; for any other, Llama's, whose names are the usual ones."""
    return FAMILIES.get(model_type.removeprefix("cla_"), FAMILIES["llama"])


def decoder_layers(model: "PreTrainedModel") -> Any:
    """The list of decoder layers of a loaded model, plain or CLA."""
    family = FAMILIES.get(model.config.model_type.removeprefix("cla_"))
    return model.get_submodule(family.layers) if family else model.base_model.layers


_NAMED = 8
"""Families that a refusal names."""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises InputError naming the architecture and those supported."""
    model_type = str(config.get("model_type", "(none)"))
    if model_type in FAMILIES:
        for key, value, why, fix in FAMILIES[model_type].requires:
            if bool(config.get(key, value)) != value:
                raise InputError(f"This model of type {model_type!r} is not supported", why=why, fix=fix)
        return FAMILIES[model_type]
    if any(model_type == family.cla_type for family in FAMILIES.values()):
        raise InputError(
            f"The model is already a Cross-Layer Attention model ({model_type})",
            why="Converting a converted model again would hide how much was lost.",
            fix="Start from its source model (see cla_manifest.json) with the sharing you want.",
        )
    named = config.get("architectures")
    architecture = ", ".join(map(str, named)) if named and isinstance(named, list) else "unknown architecture"
    raise InputError(
        f"Models of type {model_type[:100]!r} ({architecture[:200]}) are not supported",
        why=_why_not(model_type, config),
        fix=f"Supported: {', '.join([*FAMILIES][:_NAMED])} and {len(FAMILIES) - _NAMED} more (docs/families.md).",
    )


def _why_not(model_type: str, config: Mapping[str, Any]) -> str:
    """What is known of the family, and the supported one that is nearest."""
    family = nearest_family(config)
    nearest = f"The nearest supported family is {family.model_type}"
    if model_type in REFUSED:
        return f"{REFUSED[model_type]} {nearest}."
    known = "Cross-Layer Attention needs modelling code for each family."
    return f"{known} {nearest}, but {'; '.join(obstacles(config, family))}."
