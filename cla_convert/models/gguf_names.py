"""GGUF's names of tensors -> transformers', and what llama.cpp did to their contents. Imports no torch."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
}
_OTHERS = {
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "starcoder2": {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    "qwen2moe": _EXPERTS
    | {
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
    },
    "qwen3moe": _EXPERTS,
}
"""Architecture -> the names that mean something else there."""
ARCHITECTURES = (
    "llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "starcoder2", "nemotron",
)  # fmt: skip


class Target(NamedTuple):
    """Where a tensor of the file goes."""

    name: str
    """In transformers; `*` stands for the number of an expert, which is the first dimension of the contents."""
    permuted: bool
    """Rows of a head lie as rotary pairs side by side (Llama), not as two halves."""
    shifted: bool
    """Gains of norms are one larger than transformers holds them (Gemma, Nemotron)."""
    flat: bool
    """A matrix of one row lies as a vector (what opens the expert that all tokens have)."""

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor that it becomes."""
        if "*" not in self.name:
            return {self.name: (1, *shape) if self.flat else shape}
        return {self.name.replace("*", str(expert)): shape[1:] for expert in range(shape[0])}

    def contents(self, tensor: np.ndarray, heads: int) -> Iterator[np.ndarray]:
        """Contents of each; `heads` is how many the rows belong to."""
        if self.permuted:
            pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
            tensor = pairs.swapaxes(2, 1).reshape(tensor.shape)
        if self.shifted:
            tensor = tensor - 1
        yield from tensor if "*" in self.name else [tensor[None] if self.flat else tensor]


def target_of(architecture: str, name: str) -> Target | None:
    """Where the tensor `name` of a file goes; None for one that transformers' model has no place for."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None:
        return None
    layer, stem, part = match.groups()
    names = _OUTSIDE if layer is None else _LAYER | _OTHERS.get(architecture, {})
    if stem not in names:
        return None
    place = names[stem] if layer is None else f"model.layers.{layer}.{names[stem]}"
    permuted = architecture == "llama" and stem in ("attn_q", "attn_k")
    shifted = architecture in ("gemma2", "gemma3", "nemotron") and "norm" in stem and part == "weight"
    return Target(f"{place}.{part}", permuted, shifted, flat=stem == "ffn_gate_inp_shexp")
