"""The language model inside a checkpoint that also sees images, and the way back. Imports no torch.

Whatever reads a checkpoint sees its language model, under the names and the config.json that it would have alone. What
stands around it is copied into every output, byte for byte, and an output loads as the whole model again.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import InputError, first_line
from .families import FAMILIES, as_transformers_reads, without_strays
from .family import Family
from .whole_rows import INNER, WHOLES, Whole

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
_OF_BOTH = {*_TOKENS, "model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
_M_ROPE = ("mrope_section", "mrope_interleaved", "type")
_ALONE = ("lm_head.", "mtp.")
"""What stands beside both towers and belongs to the language model."""
_DECODER = ("layers.", "embed_tokens.", "norm.")
OF_IMAGES = {"preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"}
"""Files that do not belong to the language model."""


@dataclass(frozen=True)
class Around:
    """What stands around a language model."""

    whole: Whole
    config: Mapping[str, Any]
    """config.json as it lies."""
    names: Mapping[str, str]
    """Name of a tensor in the language model alone -> its name in the files."""

    @cached_property
    def starts(self) -> dict[str, str]:
        """What names begin with in the language model alone (`model.`) -> what they begin with in the files."""
        rests = {name: name.partition(".")[2] for name in self.names}
        return {name.removesuffix(rests[name]): stored.removesuffix(rests[name]) for name, stored in self.names.items()}

    def stored(self, name: str) -> str:
        """What a tensor of the language model, of a source or an output, is called in the files."""
        start = f"{name.partition('.')[0]}."
        return self.starts[start] + name.removeprefix(start)

    def config_with(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the whole around a converted language model whose own is `text`."""
        inside = _text_dict(self.config)
        shared = inside.keys() & self.config.keys() - _OF_BOTH  # of a file that tells all on one level
        changed = {key: value for key, value in text.items() if key in ("kv_source_layers", "num_key_value_heads")}
        inner = INNER.get(str(inside["model_type"]).removeprefix("cla_"))
        kind = inner.code.cla_type if inner else text["model_type"]
        dropped = {"_name_or_path", "quantization_config", "torch_dtype", "auto_map", "text_config", *shared}
        return {
            **{key: value for key, value in self.config.items() if key not in dropped},
            "architectures": [self.whole.class_name("ForConditionalGeneration")],
            "auto_map": self.whole.auto_map(),
            "dtype": text["dtype"],
            "model_type": self.whole.cla_type,
            "text_config": {**inside, **changed, "dtype": text["dtype"], "model_type": kind},
        }

    def text_code(self, family: Family) -> Family:
        """Whose modelling files the language model has inside the whole."""
        inner = INNER.get(str(_text_dict(self.config)["model_type"]).removeprefix("cla_"))
        return inner.code if inner else family


def whole_of(config: Mapping[str, Any]) -> Whole | None:
    """The row of a config.json, of a source or an output; None for one of a model that only reads."""
    return WHOLES.get(str(config.get("model_type")).removeprefix("cla_"))


def around(config: Mapping[str, Any], stored: Collection[str]) -> Around | None:
    """What stands around the language model in a checkpoint with these tensors; None for a model that only reads."""
    whole = whole_of(config)
    return Around(whole, config, _names(whole, stored)) if whole else None


def text_config(config: Mapping[str, Any], stored: Collection[str] = ()) -> dict[str, Any]:
    """The config.json of the language model alone; any other config unchanged.

    Args:
        config: of a source or an output.
        stored: names of the language model's tensors. Whole and text_config may differ in whether the output layer is
            tied, and both may leave it out: what is stored decides.

    Raises:
        InputError: transformers accepts no such config.json.
    """
    if whole_of(config) is None:
        return dict(config)
    found, said = _text_dict(config), config.get("text_config") or {}
    converted = str(found["model_type"]).startswith("cla_")
    found["model_type"] = plain = str(found["model_type"]).removeprefix("cla_")
    if inner := INNER.get(plain):
        rope = {key: value for key, value in (found.get("rope_parameters") or {}).items() if key not in _M_ROPE}
        found |= {"model_type": inner.family, "rope_parameters": rope}
    found = as_transformers_reads(found)
    family = FAMILIES.get(str(found["model_type"]))
    inherited = {key: config[key] for key in _TOKENS if key in config and key not in said}
    dtype = config.get("dtype") or config.get("torch_dtype") or found.get("dtype")
    packed = {key: config[key] for key in ("quantization_config",) if config.get(key)}
    found |= inherited | packed | ({"dtype": dtype} if dtype else {})
    if stored:
        found["tie_word_embeddings"] = "lm_head.weight" not in stored
    if family is None:
        return found | {"architectures": config.get("architectures")}
    if not converted:
        return found | {"architectures": [f"{family.class_prefix}ForCausalLM"]}
    return found | {"architectures": [family.class_name("ForCausalLM")], "model_type": family.cla_type}


def unversioned(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the version of transformers that wrote it: the same weights are the same model whichever is installed."""
    return {key: value for key, value in config.items() if key != "transformers_version"}


def cannot_be_built(error: Exception) -> InputError:
    """What transformers raised over a config.json, for people."""
    return InputError(
        "transformers cannot build the model that config.json describes",
        why=f"{type(error).__name__}: {first_line(error)}",
        fix="Mend config.json, or take it from where the weights come from.",
    )


def _text_dict(config: Mapping[str, Any]) -> dict[str, Any]:
    """`text_config` with everything that transformers assumes where it says nothing, `model_type` as in the file."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    whole = whole_of(config)
    assert whole is not None, "asked of a whole only"
    settings = copy.deepcopy({key: value for key, value in config.items() if key != "auto_map"})
    said = settings.get("text_config")
    said = said if isinstance(said, dict) else {}
    plain = {**said, "model_type": str(said["model_type"]).removeprefix("cla_")} if "model_type" in said else said
    settings |= {"model_type": whole.model_type} | ({"text_config": plain} if plain else {})
    try:
        text = CONFIG_MAPPING[whole.model_type].from_dict(settings).text_config.to_diff_dict()
    except Exception as error:  # of any kind: what a config.json may hold is whatever people write
        raise cannot_be_built(error) from error
    if text.get("layer_types") is None:
        text.pop("layer_types", None)
    kept = {key: said[key] for key in ("kv_source_layers", "model_type") if key in said}
    return without_strays({key: value for key, value in text.items() if key != "_name_or_path"} | kept)[0]


def _names(whole: Whole, stored: Collection[str]) -> dict[str, str]:
    """Which of the tensors are the language model's, by the names that it has alone."""
    found = {}
    part = whole.text
    flat = not any(name.startswith((f"{part}.", f"model.{part}.")) for name in stored)  # Qwen2-VL as published
    for name in stored:
        inside = name.removeprefix("model.").removeprefix(f"{part}.")
        if name.startswith(_ALONE):
            found[name] = name
        elif name.startswith(f"{part}.lm_head."):
            found[inside] = name
        elif name.startswith((f"{part}.", f"model.{part}.")):
            found[f"model.{inside.removeprefix('model.')}"] = name
        elif flat and name.startswith(tuple(f"model.{start}" for start in _DECODER)):
            found[name] = name
    return found
