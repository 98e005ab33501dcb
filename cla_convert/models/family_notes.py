"""What people want to know of each family: which checkpoints it is, how it differs, what was measured. For the docs."""

from typing import NamedTuple


class Notes(NamedTuple):
    """Of one family."""

    checkpoints: str
    """Models that people have, by the names they know."""
    difference: str = ""
    """What is different from Llama."""
    measured: str = ""
    """With weights that somebody published; empty: none of them yet."""


NOTES = {
    "llama": Notes(
        "Llama 2, 3, 3.1, 3.2; TinyLlama; SmolLM, SmolLM2; Yi; many others",
        measured="SmolLM2-135M: everything in [measurements](measurements.md)",
    ),
    "mistral": Notes(
        "Mistral 7B, Mistral Nemo, Mistral Small (2501); the language model of Mistral Small 3.1 and 3.2",
        "v0.1: every layer slides",
    ),
    "ministral": Notes("`ministral`, and `mistral` with `layer_types`", "`layer_types` says which layers slide"),
    "ministral3": Notes(
        "the language model of Ministral 3 3B, 8B, 14B (bf16)", "queries grow with their position beyond 16k tokens"
    ),
    "qwen2": Notes("Qwen2, Qwen2.5, and what is distilled into them", "biases on q, k and v; late layers may slide"),
    "qwen3": Notes("Qwen3 0.6B to 32B", "q and k are normed per head, before RoPE"),
    "gemma": Notes("Gemma 2B, 7B; CodeGemma", "wide heads; embeddings are scaled"),
    "vaultgemma": Notes("VaultGemma 1B", "as Gemma 2, without norms behind the branches"),
    "cohere": Notes(
        "Command R (08-2024), Aya 23, Aya Expanse", "attention and MLP in parallel; LayerNorm; adjacent pairs"
    ),
    "cwm": Notes("Code World Model 32B", "three layers in four slide"),
    "jais2": Notes("Jais 2 8B, 70B", "LayerNorm; biases everywhere; an MLP without a gate"),
    "gemma2": Notes("Gemma 2 2B, 9B, 27B", "every other layer slides; soft caps on scores and logits"),
    "gemma3_text": Notes(
        "Gemma 3 270M, 1B; the language model of 4B, 12B, 27B",
        "five layers in six slide, with a RoPE of their own; q and k are normed",
        "Gemma 3 270M: conversion and training (below)",
    ),
    "phi3": Notes("Phi-3, Phi-3.5 mini, Phi-4, Phi-4-mini", "one fused `qkv_proj`; partial and long RoPE"),
    "olmo2": Notes("OLMo 2 1B, 7B, 13B, 32B", "q and k are normed over all heads at once; norms after each branch"),
    "olmo3": Notes("OLMo 3 7B, 32B", "as OLMo 2; three layers in four slide, full ones have a RoPE of their own"),
    "glm": Notes("GLM-4 9B (`-hf`), GLM-Edge", "half of each head is rotated, in adjacent pairs; biases on q, k and v"),
    "glm4": Notes("GLM-4-0414 9B, 32B", "as `glm`; norms before and after each branch"),
    "ernie4_5": Notes("ERNIE 4.5 0.3B", "rotated in adjacent pairs"),
    "cohere2": Notes(
        "Command R7B, Command A",
        "attention and MLP in parallel; LayerNorm; adjacent pairs; every fourth layer is full and has no RoPE",
    ),
    "exaone4": Notes(
        "EXAONE 4.0 1.2B, 32B",
        "q and k are normed; norms after each branch; beside sliding layers, full ones have no RoPE",
    ),
    "seed_oss": Notes("Seed-OSS 36B", "biases on q, k and v; dropout on residuals"),
    "arcee": Notes("AFM 4.5B", "an MLP without a gate"),
    "apertus": Notes("Apertus 8B, 70B", "q and k are normed; an MLP without a gate, with xIELU"),
    "hunyuan_v1_dense": Notes("HunYuan 0.5B to 7B", "q and k are normed per head, after RoPE"),
    "nemotron": Notes(
        "Nemotron-4, Minitron 4B, 8B", "LayerNorm with gain + 1; a part of each head is rotated; no gate in the MLP"
    ),
    "granite": Notes("Granite 3.0 to 3.3 2B, 8B", "multipliers on scores, residuals, embeddings and logits"),
    "smollm3": Notes("SmolLM3 3B", "every fourth layer has no RoPE"),
    "starcoder2": Notes("StarCoder2 3B, 7B, 15B", "LayerNorm; biases everywhere; may slide"),
    "gpt_bigcode": Notes("SantaCoder, StarCoder, StarCoderBase", "multi-query, one fused `c_attn`, learned positions"),
    "lfm2": Notes(
        "LFM2, LFM2.5 350M, 700M, 1.2B, 2.6B",
        "a hybrid: most layers are short convolutions and stay as they are; q and k are normed per head",
    ),
    "lfm2_moe": Notes("LFM2 8B-A1B, 24B-A2B", "as `lfm2`; experts"),
    "mixtral": Notes("Mixtral 8x7B, 8x22B", "experts"),
    "qwen2_moe": Notes("Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B", "experts, one of them always; biases on q, k and v"),
    "qwen3_moe": Notes("Qwen3-30B-A3B, Qwen3-235B-A22B", "experts; q and k are normed"),
    "qwen3_next": Notes(
        "Qwen3-Next 80B-A3B",
        "a hybrid: three layers in four are linear attention (Gated DeltaNet) and stay as they are; experts; a gate "
        "on each channel of a head; q and k are normed; a quarter of each head is rotated",
    ),
    "qwen3_5_text": Notes("the language model of Qwen3.5 0.8B to 27B", "a hybrid as `qwen3_next`, without experts"),
    "qwen3_5_moe_text": Notes(
        "the language model of Qwen3.5 35B-A3B, 122B-A10B, 397B-A17B", "as `qwen3_5_text`; experts, one of them always"
    ),
    "ernie4_5_moe": Notes("ERNIE 4.5 21B-A3B, 300B-A47B", "as `ernie4_5`; experts, some of them always"),
    "flex_olmo": Notes("FlexOlmo 7x7B", "as OLMo 2; experts; multi-head"),
    "dots1": Notes("dots.llm1 142B-A14B", "experts, some of them always; q and k are normed; multi-head"),
    "exaone_moe": Notes(
        "K-EXAONE 236B-A23B",
        "experts, one of them always; q and k are normed; full layers have no RoPE beside sliding ones",
    ),
    "hy_v3": Notes("HunYuan 3", "experts, one of them always; q and k are normed"),
    "mellum": Notes("Mellum 2", "experts; q and k are normed; some layers slide, with a RoPE of their own"),
    "minimax_m2": Notes(
        "MiniMax M2, M2.1 in bf16", "experts; q and k are normed over all heads at once; a part of each head is rotated"
    ),
    "phimoe": Notes("Phi-3.5-MoE, Phi-mini-MoE", "experts; LayerNorm; biases; long RoPE"),
    "solar_open": Notes("Solar Open 100B-A12B", "experts, one of them always"),
    "olmoe": Notes("OLMoE 1B-7B", "experts; q and k are normed over all heads at once; multi-head"),
    "granitemoe": Notes("Granite 3.0 and 3.1 1B-A400M, 3B-A800M", "experts; multipliers as in Granite"),
    "glm4_moe": Notes("GLM-4.5-Air", "experts, one of them always; half of each head is rotated; biases on q, k and v"),
    "gpt_oss": Notes(
        "GPT-OSS 20B, 120B; experts in MXFP4 are dequantised to bf16",
        "experts; every other layer slides; each query head has a sink, a logit that no key belongs to",
    ),
}
"""By `model_type`, one for every row of the table."""
