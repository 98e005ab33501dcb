"""GGUF files as llama.cpp's converter writes them, from tiny models, with names by gguf's own table."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

_ARCHITECTURES = {"gemma3_text": "gemma3", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}


def save_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    without: str = "",
) -> Path:
    """Write a model.

    Args:
        model: of a family that GGUF knows.
        path: the file.
        metadata: further keys below the architecture's name.
        extra: further tensors.
        without: leave out tensors whose name holds this.
    """
    config: Any = model.config
    architecture = _ARCHITECTURES.get(config.model_type, config.model_type)
    writer = GGUFWriter(path, architecture)
    _write_metadata(writer, config, architecture)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}
        add[type(value)](f"{architecture}.{key}", value)
    for name, tensor in _tensors(model, architecture):
        if not without or without not in name:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.astype(np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def _write_metadata(writer: GGUFWriter, config: Any, architecture: str) -> None:
    writer.add_name("Tiny")
    writer.add_file_type(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture in ("llama", "phi3", "nemotron"):
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if architecture in ("qwen3", "qwen3moe", "gemma2", "gemma3"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture in ("starcoder2", "nemotron"):
        writer.add_layer_norm_eps(config.norm_epsilon if architecture == "starcoder2" else config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture in ("qwen2moe", "qwen3moe"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    tokens = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())[:-2], "ab", "cd"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _tensors(model: PreTrainedModel, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    config: Any = model.config
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(MODEL_ARCH(number), config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        tensor = parameter.float().numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            layer, half = name.split(".")[2], tensor.shape[1] // 2
            yield f"blk.{layer}.ffn_gate_exps.weight", tensor[:, :half]
            yield f"blk.{layer}.ffn_up_exps.weight", tensor[:, half:]
            continue
        if name.endswith("experts.down_proj"):
            yield f"blk.{name.split('.')[2]}.ffn_down_exps.weight", tensor
            continue
        module, part = name.rsplit(".", 1)
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            tensor = _in_pairs(tensor, config.num_key_value_heads if "k_proj" in name else config.num_attention_heads)
        if architecture in ("gemma2", "gemma3", "nemotron") and module.endswith("norm") and part == "weight":
            tensor = tensor + 1
        if module.endswith("shared_expert_gate"):
            tensor = tensor[0]
        theirs = names.get_name(module)
        assert theirs, f"gguf has no name for {module}"
        yield f"{theirs}.{part}", tensor


def _in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves side by side, as llama.cpp keeps them for Llama."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
