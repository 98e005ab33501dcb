"""The config.json of a GGUF file, from its metadata and the names of its tensors. Imports no torch.

Every key below the architecture's name either arrives in config.json or is known to change nothing; any other one is
refused, because a model without it would be another model.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError
from .gguf_header import Header
from .gguf_rope import rope_parameters

_SIZES = {
    "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_GEMMA = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_MORE = {
    "gemma2": _GEMMA,
    "gemma3": _GEMMA | {"attention.sliding_window_pattern": "sliding_window_pattern"},
    "phi3": {"attention.sliding_window": "sliding_window"},
    "starcoder2": {"attention.sliding_window": "sliding_window", "attention.layer_norm_epsilon": "norm_epsilon"},
    "nemotron": {"attention.layer_norm_epsilon": "norm_eps"},
    "qwen2moe": _EXPERTS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    "qwen3moe": _EXPERTS,
}
"""Architecture -> its own keys and what config.json calls them."""
_READ_ELSEWHERE = {
    "block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "rope.dimension_count", "rope.freq_base", "vocab_size", "tensor_data_layout",
}  # fmt: skip
_CHANGES_NOTHING = {
    "expert_count": 0, "expert_used_count": 0, "attention.sliding_window": 0, "attention.causal": True,
    "use_parallel_residual": False, "pooling_type": 0, "logit_scale": 1.0,
}  # fmt: skip
"""Keys with the value that means what is so anyway."""
_HEAD_DIM_BY_DEFAULT = {"qwen3", "gemma2", "gemma3", "qwen3moe"}
"""Families whose head size, if nobody gives it, is a number and not the hidden size divided by the heads."""
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, which scale their scores by the hidden size divided by the heads instead of the head size.
GGUF does not say so; llama.cpp goes by this number too."""


def config_of(header: Header, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Settings of transformers' configuration class.

    Args:
        header: of the file.
        factors: contents of its RoPE factor tensors.

    Raises:
        InputError: for a key that cannot be said in a config.json.
    """
    architecture = str(header.metadata["general.architecture"])
    start = f"{architecture}."
    found = {key.removeprefix(start): value for key, value in header.metadata.items() if key.startswith(start)}
    settings = header.config() | _renamed(architecture, found)
    head_dim = _head_dim(architecture, found, settings)
    if architecture in _HEAD_DIM_BY_DEFAULT or head_dim * settings["num_attention_heads"] != settings["hidden_size"]:
        settings["head_dim"] = head_dim
    settings |= _tokens(header) | _biases(architecture, header) | _scores(architecture, settings, head_dim)
    return settings | _rope(architecture, found, factors, settings, head_dim)


def _renamed(architecture: str, found: Mapping[str, Any]) -> dict[str, Any]:
    names = _SIZES | _MORE.get(architecture, {})
    for key, value in found.items():
        known = key in names or key in _READ_ELSEWHERE or key.startswith("rope.scaling.")
        local = architecture == "gemma3" and key == "rope.freq_base_swa"
        if not (known or local or (key in _CHANGES_NOTHING and value == _CHANGES_NOTHING[key])):
            raise InputError(
                f"The GGUF file has a setting that cannot be read: {architecture}.{key}",
                why=f"It is {value!r}, and the model would be another one without it.",
                fix="Use the safetensors checkpoint of this model.",
            )
    settings = {names[key]: value for key, value in found.items() if key in names}
    if "sliding_window" in settings:
        settings["sliding_window"] = settings["sliding_window"] or None  # 0: none
    if architecture == "starcoder2":
        settings.setdefault("sliding_window", None)
    if architecture in ("qwen2moe", "qwen3moe"):
        settings["norm_topk_prob"] = architecture == "qwen3moe"  # so in llama.cpp, and in every released model
    return settings


def _head_dim(architecture: str, found: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    usual = settings["hidden_size"] // settings["num_attention_heads"]
    rotated = found.get("rope.dimension_count")
    head_dim = found.get("attention.key_length") or (rotated if architecture == "llama" and rotated else usual)
    if found.get("attention.value_length", head_dim) != head_dim:
        raise _mismatch(architecture, "attention.value_length", found["attention.value_length"], head_dim)
    if rotated not in (None, head_dim) and architecture not in ("phi3", "nemotron"):
        raise _mismatch(architecture, "rope.dimension_count", rotated, head_dim)
    return head_dim


def _mismatch(architecture: str, key: str, value: Any, head_dim: int) -> InputError:
    return InputError(
        f"The GGUF file has a setting that cannot be read: {architecture}.{key}",
        why=f"It is {value} where heads have {head_dim} channels.",
        fix="Use the safetensors checkpoint of this model.",
    )


def _tokens(header: Header) -> dict[str, Any]:
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
    ids = {ours: header.metadata.get(f"tokenizer.ggml.{theirs}") for theirs, ours in names.items()}
    return {
        "vocab_size": header.shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in header.shapes,
        **ids,
    }


def _biases(architecture: str, header: Header) -> dict[str, bool]:
    attention, mlp = "blk.0.attn_q.bias" in header.shapes, "blk.0.ffn_up.bias" in header.shapes
    by_architecture = {
        "llama": {"attention_bias": attention, "mlp_bias": mlp},
        "qwen3": {"attention_bias": attention},
        "qwen3moe": {"attention_bias": attention},
        "starcoder2": {"use_bias": attention},
        "nemotron": {"attention_bias": attention, "mlp_bias": mlp},
        "qwen2moe": {"qkv_bias": attention},
    }
    return by_architecture.get(architecture, {})


def _scores(architecture: str, settings: Mapping[str, Any], head_dim: int) -> dict[str, int]:
    if architecture not in _LARGEST_GEMMA:
        return {}
    largest = settings["num_hidden_layers"] == _LARGEST_GEMMA[architecture]
    return {
        "query_pre_attn_scalar": settings["hidden_size"] // settings["num_attention_heads"] if largest else head_dim
    }


def _rope(
    architecture: str,
    found: Mapping[str, Any],
    factors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    head_dim: int,
) -> dict[str, Any]:
    start = "rope.scaling."
    scaling = {key.removeprefix(start): value for key, value in found.items() if key.startswith(start)}
    dimensions = found.get("rope.dimension_count", head_dim)
    theta = found.get("rope.freq_base", 1_000_000.0 if architecture == "gemma3" else 10_000.0)
    rope = rope_parameters(
        scaling, factors, theta=theta, dimensions=dimensions, context=settings["max_position_embeddings"]
    )
    if dimensions != head_dim or architecture == "nemotron":  # without one, transformers turns half of Nemotron's
        rope["partial_rotary_factor"] = dimensions / head_dim
    if architecture == "gemma3":  # only its full layers are scaled
        local = {"rope_type": "default", "rope_theta": found.get("rope.freq_base_swa", 10_000.0)}
        return {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}
    original = "original_max_position_embeddings"
    if architecture == "phi3" and original in rope:  # there, the one outside has the last word
        return {"rope_parameters": rope, original: rope[original]}
    return {"rope_parameters": rope}
