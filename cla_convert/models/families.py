"""The supported families by name, and the family of a config.json. Imports no torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .family import CODE_FOLDER as CODE_FOLDER
from .family import Family
from .family_rows import ROWS
from .nearest import nearest_family, obstacles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = {family.model_type: family for family in ROWS}

_SHARES_ALREADY = (
    "Its last layers read the K/V of earlier ones as published, which transformers hands on by kind of layer and not "
    "by a map. Sharing among the others, too, takes an attention and a model of its own."
)
_GEMMA_4 = (
    "Its full layers have larger heads than the sliding ones and may use keys as values, and its last layers may read "
    "the K/V of earlier ones. That takes an attention and a model of its own."
)
_LATENT = "It caches one compressed vector per token (multi-head latent attention) instead of keys and values."
_STABLELM = (
    "Its attention rotates a part of each head by itself; models with fewer KV than query heads (12B) norm each head "
    "apart, too, and run attention and MLP in parallel. That would be three more fields of the code, for one model."
)
_TWO_CLASSES = (
    "Its layers with attention are of another class in transformers than those with a state, and stand in one list. "
    "That takes a list of two classes in the CLA code, and"
)
REFUSED = {
    "falcon_h1": "Attention and a state-space model run side by side in every layer, and transformers' caches keep "
    "nothing at all, not even the state, for a layer that reads another's K/V. That takes a kind of cache of its own.",
    "jamba": f"{_TWO_CLASSES} the state of Mamba 1 in the accounts of the cache.",
    "olmo_hybrid": f"{_TWO_CLASSES} layers whose norms stand in two places, before a state and behind attention.",
    "granitemoehybrid": "Its layers have an MLP and experts at once, or the MLP alone, and its attention rotates or "
    "not by one setting. That takes these two in the CLA code, and the state of Mamba 2 in the accounts of the cache.",
    "falcon": "Its attention is code of its own in transformers, outside the attention interface that CLA code calls, "
    "and it copies K/V to every query head before caching them, so its cache is as large as with multi-head attention.",
    "stablelm": _STABLELM,
    "gemma3n": _SHARES_ALREADY,
    "gemma3n_text": _SHARES_ALREADY,
    "gemma4": _GEMMA_4,
    "gemma4_text": _GEMMA_4,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
}
"""Families that people ask for, and why there is no row for them."""


def as_transformers_reads(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the `model_type` that transformers loads it as: Mistral with `layer_types` is Ministral."""
    if config.get("model_type") == "mistral" and "layer_types" in config:
        return {**config, "model_type": "ministral"}
    return config


def family_like(model_type: str) -> Family:
    """The family of a plain or CLA model; for any other, Llama's, whose names are the usual ones."""
    return FAMILIES.get(model_type.removeprefix("cla_"), FAMILIES["llama"])


def decoder_layers(model: "PreTrainedModel") -> Any:
    """The list of decoder layers of a loaded model, plain or CLA."""
    family = FAMILIES.get(model.config.model_type.removeprefix("cla_"))
    return model.get_submodule(family.layers) if family else model.base_model.layers


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
        fix=f"Supported: {', '.join(FAMILIES)}.",
    )


def _why_not(model_type: str, config: Mapping[str, Any]) -> str:
    """What is known of the family, and the supported one that is nearest."""
    family = nearest_family(config)
    nearest = f"The nearest supported family is {family.model_type}"
    if model_type in REFUSED:
        return f"{REFUSED[model_type]} {nearest}."
    known = "Cross-Layer Attention needs modelling code for each family."
    return f"{known} {nearest}, but {'; '.join(obstacles(config, family))}."
