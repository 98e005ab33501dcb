"""The language model of a checkpoint that also sees images (Gemma 3, Mistral Small 3, Ministral 3). Imports no torch.

Its weights are renamed and its `text_config` becomes the config.json; the vision tower is left out. From there on the
model is one like those that only read.
"""

from collections.abc import Mapping
from typing import Any

from .checkpoint import Checkpoint
from .families import FAMILIES, as_transformers_reads

_TYPES = {
    "gemma3": "gemma3_text", "mistral3": "mistral", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text",
}  # fmt: skip
"""`model_type` of the whole -> of its text_config, where that says nothing."""
_PREFIXES = {
    "language_model.model.": "model.",  # as published
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",  # as transformers names the modules today
    "lm_head.": "lm_head.",
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
OF_IMAGES = {"preprocessor_config.json", "processor_config.json"}
"""Files that do not belong to the language model."""


def has_text_part(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes such a model."""
    return str(config.get("model_type")) in _TYPES and isinstance(config.get("text_config"), dict)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the language model alone; any other config unchanged."""
    if not has_text_part(config):
        return dict(config)
    inherited = {key: config[key] for key in _TOKENS if key in config}
    dtype = config.get("dtype") or config.get("torch_dtype")
    packed = {key: config[key] for key in ("quantization_config",) if config.get(key)}
    named = {"model_type": _TYPES[config["model_type"]]}
    found = named | inherited | config["text_config"] | packed | ({"dtype": dtype} if dtype else {})
    found = as_transformers_reads(found)
    family = FAMILIES.get(str(found["model_type"]))
    return found | {"architectures": [f"{family.class_prefix}ForCausalLM"] if family else config.get("architectures")}


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """The language model alone, under the names that it has on its own; any other checkpoint unchanged."""
    if not has_text_part(checkpoint.config):
        return checkpoint
    tensors = {}
    for name, info in checkpoint.tensors.items():
        for prefix, own in _PREFIXES.items():
            if name.startswith(prefix):
                tensors[own + name.removeprefix(prefix)] = info
                break
    # Whole and text_config may differ in this, and both leave it out; what is stored decides.
    tied = {"tie_word_embeddings": "lm_head.weight" not in tensors}
    return Checkpoint(checkpoint.folder, text_config(checkpoint.config) | tied, tensors)
