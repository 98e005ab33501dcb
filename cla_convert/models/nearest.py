"""Which supported family a model is nearest to, and what stands between: from config.json alone. Imports no torch."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

from .family import Family
from .family_rows import ROWS
from .kinds import FULL, SLIDING, full

_HYBRID = (
    "attn_layer_period", "block_types", "full_attn_idxs", "hybrid_override_pattern", "layers_block_type",
    "linear_num_value_heads", "mamba_d_state", "ssm_state_size", "state_size",
)  # fmt: skip
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_NORMS = ("qk_layernorm", "qk_norm", "use_qk_norm")


def nearest_family(config: Mapping[str, Any]) -> Family:
    """By name, as far as letters agree; for a name that is new, one with experts or Llama."""
    model_type = str(config.get("model_type"))
    related = [family for family in ROWS if _letters(family.model_type) == _letters(model_type)]
    related = related or [family for family in ROWS if model_type.startswith(_letters(family.model_type))]
    if related:
        return max(related, key=lambda family: SequenceMatcher(None, model_type, family.model_type).ratio())
    name = "gpt_bigcode" if "n_embd" in config else "mixtral" if _has_experts(config) else "llama"
    return next(family for family in ROWS if family.model_type == name)


def obstacles(config: Mapping[str, Any], family: Family) -> list[str]:
    """What a config.json says of its layers that the CLA code of `family` does not do."""
    return list(_obstacles(config, family)) or [
        "nothing in config.json tells how its attention differs: that takes comparing the two in transformers"
    ]


def _obstacles(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    text = config.get("text_config")
    if isinstance(text, Mapping):
        yield "its language model is a part of one that reads more than text"
        config = {**config, **text}
    kinds = config.get("layer_types")
    for kind, count in Counter(map(str, kinds if isinstance(kinds, list) else [])).items():
        if kind not in (FULL, SLIDING):
            yield f"{count} of its layers are {kind}"
    if any(config.get(key) for key in _HYBRID):
        yield "some of its layers keep a state in place of keys and values"
    if config.get("kv_lora_rank"):
        yield "it caches one compressed vector per token (multi-head latent attention) instead of keys and values"
    if config.get("num_kv_shared_layers"):
        yield "its last layers read the keys and values of earlier ones as it is"
    if config.get("cross_attention_layers") or config.get("is_encoder_decoder") or config.get("add_cross_attention"):
        yield "some of its attention reads another sequence"
    if config.get("attention_chunk_size"):
        yield "some of its layers attend within chunks"
    if _has_experts(config) and not family.code.experts:
        yield "its layers have experts"
    if any(config.get(key) for key in _NORMS) and not family.qk_norm:
        yield "it norms queries and keys"
    if (config.get("use_parallel_residual") or config.get("parallel_attn")) and not family.parallel:
        yield "its attention and MLP run in parallel"
    if config.get("alibi"):
        yield "its attention has ALiBi biases in place of RoPE"
    if config.get("sliding_window") and config.get("use_sliding_window", True) and family.kinds is full:
        yield "some of its layers may see a window only"


def _has_experts(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) for key in _EXPERTS)


def _letters(model_type: str) -> str:
    """`qwen3_moe` -> `qwen`; as it is where that would tell nothing (GPT)."""
    found = re.match(r"(?!gpt)[a-z]+", model_type)
    return found[0] if found else model_type
