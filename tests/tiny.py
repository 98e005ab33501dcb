"""A tiny random model of every supported family: 6 layers or so, 4 query heads, windows shorter than the test texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cla_convert.models.classes import cla_classes
from cla_convert.models.families import FAMILIES

COMMON: dict[str, Any] = dict(
    vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    initializer_range=0.2,
)  # fmt: skip
ABSENT = object()
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
          "num_hidden_layers": 8, "layer_types": ["linear_attention", "full_attention"] * 4, "head_dim": 16,
          "partial_rotary_factor": 0.5}  # fmt: skip
CONVOLUTIONS = {"num_hidden_layers": 9, "layer_types": [*["conv", "full_attention"] * 2, *["conv"] * 2,
                                                        *["full_attention"] * 3]}  # fmt: skip
LLAMA_4_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 8,
                "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}  # fmt: skip
"""Queries grow beyond 8 tokens."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "tie_word_embeddings": False}),
    "llama-odd": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "ministral": ("ministral", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 3}),
    "arcee": ("arcee", {}),
    "arcee-biases": ("arcee", {"attention_bias": True, "mlp_bias": True}),
    "seed_oss": ("seed_oss", {"attention_dropout": 0.0, "residual_dropout": 0.0}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 4}),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 4, "sliding_window_pattern": 3}),
    "phi3": ("phi3", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "phi3-partial": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 8, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "olmo3": (
        "olmo3",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
    ),
    "glm": ("glm", {"attention_bias": True}),
    "glm4": ("glm4", {"attention_bias": True}),
    "ernie4_5": ("ernie4_5", {"tie_word_embeddings": True}),
    "ernie4_5-biases": ("ernie4_5", {"use_bias": True}),
    "ministral3": ("ministral3", {"rope_parameters": LLAMA_4_ROPE}),
    "cohere2": ("cohere2", {"sliding_window": 8, "sliding_window_pattern": 3, "head_dim": ABSENT}),
    "exaone4": ("exaone4", {"sliding_window": 8, "sliding_window_pattern": 3}),
    "exaone4-full": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 6}),
    "apertus": ("apertus", {}),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "nemotron": ("nemotron", {}),
    "qwen2_moe": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 16, "use_sliding_window": True, "sliding_window": 8},
    ),
    "olmoe": ("olmoe", EXPERTS),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    "glm4_moe": ("glm4_moe", EXPERTS | {"n_routed_experts": 4}),
    "gpt_oss": ("gpt_oss", EXPERTS | {"num_local_experts": 4, "sliding_window": 8}),
    "lfm2": ("lfm2", CONVOLUTIONS | {"block_auto_adjust_ff_dim": False}),
    "qwen3_next": ("qwen3_next", EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16}),
    "qwen3_5": ("qwen3_5_text", LINEAR),
    "qwen3_5_moe": ("qwen3_5_moe_text", EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16}),
    "lfm2_moe": ("lfm2_moe", EXPERTS | CONVOLUTIONS | {"num_dense_layers": 2}),
    "gemma": ("gemma", {}),
    "vaultgemma": ("vaultgemma", {"sliding_window": 8, "query_pre_attn_scalar": 4}),
    "cohere": ("cohere", {"head_dim": ABSENT}),
    "cwm": ("cwm", {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 3}),
    "jais2": ("jais2", {}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}),
    "flex_olmo": ("flex_olmo", EXPERTS),
    "dots1": (
        "dots1",
        EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "max_window_layers": 3, "sliding_window": 8},
    ),
    "exaone_moe": ("exaone_moe", EXPERTS | {"sliding_window": 8, "sliding_window_pattern": 3}),
    "hy_v3": ("hy_v3", EXPERTS),
    "mellum": ("mellum", EXPERTS | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 3}),
    "minimax_m2": ("minimax_m2", EXPERTS | {"num_local_experts": 4}),
    "phimoe": ("phimoe", EXPERTS | {"num_local_experts": 4}),
    "phimoe-window": ("phimoe", EXPERTS | {"num_local_experts": 4, "sliding_window": 8}),
    "solar_open": ("solar_open", EXPERTS | {"n_routed_experts": 4}),
    "granite": ("granite", {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 3}),
    "starcoder2": ("starcoder2", {"sliding_window": 8}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": 8}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "gpt_bigcode": ("gpt_bigcode", {"num_key_value_heads": ABSENT, "head_dim": ABSENT}),
}
"""Name of the case -> family and what differs from COMMON."""


def tiny_config(case: str, **overrides: Any) -> PreTrainedConfig:
    """Configuration of the source model."""
    family, settings = CASES[case]
    settings = COMMON | settings | overrides
    return AutoConfig.for_model(family, **{key: value for key, value in settings.items() if value is not ABSENT})


def shake(model: PreTrainedModel) -> PreTrainedModel:
    """Biases start at 0 and norms at one value: make all of them count."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
    if {"num_experts", "num_local_experts", "moe_num_experts"} & set(dir(model.config)):
        model.set_experts_implementation("eager")  # the default has no float64
    return model


def source_model(case: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The plain transformers model."""
    torch.manual_seed(seed)
    return shake(AutoModelForCausalLM.from_config(tiny_config(case, **overrides))).eval()


def cla_model(case: str, sources: Sequence[int | None] | None, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The CLA model with a sharing map (None: the identity)."""
    settings = tiny_config(case, **overrides).to_dict()
    settings.pop("model_type")
    classes = cla_classes(FAMILIES[CASES[case][0]])
    torch.manual_seed(seed)
    return shake(classes["ForCausalLM"](classes["Config"](**settings, kv_source_layers=sources))).eval()


def save_tiny(case: str, folder: Path, **overrides: Any) -> Path:
    """Save a source model and its tokenizer into `folder`."""
    from .conftest import byte_tokenizer

    source_model(case, **overrides).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
