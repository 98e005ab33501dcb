"""The language model inside a Gemma 3 checkpoint that also sees images (4B, 12B and 27B). Imports no torch.

Its weights are renamed and its `text_config` becomes the config.json; the vision tower is left out. From there on the
model is a `gemma3_text` like the smaller ones.
"""

from collections.abc import Mapping
from typing import Any

from .checkpoint import Checkpoint

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
    return config.get("model_type") == "gemma3" and isinstance(config.get("text_config"), dict)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the language model alone; any other config unchanged."""
    if not has_text_part(config):
        return dict(config)
    inherited = {key: config[key] for key in _TOKENS if key in config}
    dtype = config.get("dtype") or config.get("torch_dtype")
    found = inherited | config["text_config"] | ({"dtype": dtype} if dtype else {})
    return found | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}


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
    return Checkpoint(checkpoint.folder, text_config(checkpoint.config), tensors)
