"""The table of supported families: where their attention lies, and how their CLA code differs. Imports no torch.

A new family is one row here and a tiny case in tests/tiny.py; `python -m cla_convert.models.generate` then writes its
two code files.
"""

from typing import Any

from . import kinds, states
from .family import POST_NORM, SANDWICH, Family, LayerNorms, Requirement
from .family_code import FROM_ATTENTION, FROM_CONFIG, Code, Fused

_CAUSAL = Requirement(
    "use_bidirectional_attention", False,
    "It attends in both directions (an encoder such as EmbeddingGemma), so it has no KV cache to make smaller.",
    "Give a causal language model.",
)  # fmt: skip
_MULTI_QUERY = Requirement(
    "multi_query", True,
    "With multi_query: false this family is multi-head attention, and interleaves the heads of q, k and v.",
    "Give a multi-query checkpoint (SantaCoder, StarCoder).",
)  # fmt: skip
_NOT_CLIPPED = Requirement(
    "clip_qkv", False,
    "With clip_qkv queries, keys and values are cut off at a bound, which pooling does not know of.",
    "Give a model that was trained without (OLMoE as published).",
)  # fmt: skip
_NO_QK_NORM = Requirement(
    "use_qk_norm", False,
    "Some models of this family norm queries and keys (GLM-4.5 with 355B parameters, GLM-4.6), others do not; the CLA "
    "code is that of those that do not.",
    "Give one of the others (GLM-4.5-Air).",
)  # fmt: skip
_NOT_NORMED = Requirement(
    "use_qk_norm", False,
    "Command R+ norms queries and keys with a gain for each head; the CLA code is that of those that do not.",
    "Give one of the others (Command R).",
)  # fmt: skip
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096}
_GPT2_KEYS = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd"}

_PHI3_SIZES = Fused(
    "config.hidden_size, config.num_attention_heads * self.head_dim, bias=False",
    "config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False",
)
_PHI3_PLAN = (
    ("self_attn.q_proj", "colwise", ""),
    ("self_attn.k_proj", "colwise", ""),
    ("self_attn.v_proj", "colwise", ""),
    ("self_attn.o_proj", "rowwise", ""),
    ("mlp.gate_up_proj", "colwise_gather_output", "as in Phi-3: the output is chunked"),
    ("mlp.down_proj", "rowwise_split_input", ""),
)
_LFM2: dict[str, Any] = {
    "state": states.convolution, "o_proj": "out_proj", "mlp": "feed_forward", "qk_norm": True,
    "qk_norm_names": ("q_layernorm", "k_layernorm"), "norms": LayerNorms("operator_norm", "ffn_norm"),
}  # fmt: skip
_DROPPED_OUT = "nn.functional.dropout({}, p=self.residual_dropout, training=self.training)"

_GLM = {"num_key_value_heads": 2, "head_dim": 128}
_GLM4_NORMS = LayerNorms(
    "input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"
)
_LLAMA_4_SCALE = (
    "rope = self.config.rope_parameters",
    'beta, length = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]',
    'query = query * get_llama_4_attn_scale(kwargs["position_ids"], beta, length).to(query.dtype)',
)
_PRE_NORM_FORWARD = (
    "attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)",
    "hidden_states = hidden_states + attended",
    "return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))",
)

ROWS = [
    Family("llama", "Llama", Code("Llama")),
    Family(
        "mistral", "Mistral", Code("Mistral", arguments=(FROM_CONFIG,)), kinds.windowed,
        {"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    Family(
        "ministral", "Ministral", Code("Ministral", arguments=(FROM_ATTENTION,), layer_types=True),
        kinds.listed_or_windowed, {"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    Family(
        "ministral3", "Ministral3",
        Code(
            "Ministral 3", arguments=(FROM_CONFIG,), queries=_LLAMA_4_SCALE, functions=("get_llama_4_attn_scale",),
        ),
        kinds.windowed, {"num_key_value_heads": 8, "head_dim": 128},
    ),
    Family(
        "qwen2", "Qwen2", Code("Qwen2", arguments=(FROM_ATTENTION,), layer_types=True), kinds.late_windows, _QWEN,
    ),
    Family(
        "qwen3", "Qwen3", Code("Qwen3", arguments=(FROM_ATTENTION,), layer_types=True), kinds.late_windows,
        _QWEN | {"head_dim": 128}, qk_norm=True,
    ),
    Family("gemma", "Gemma", Code("Gemma"), defaults={"num_key_value_heads": 16, "head_dim": 256}, requires=(_CAUSAL,)),
    Family(
        "vaultgemma", "VaultGemma",
        Code("VaultGemma", arguments=(FROM_ATTENTION, "softcap=self.attn_logit_softcapping"), layer_types=True),
        kinds.alternating, _GEMMA, norms=LayerNorms(before_mlp="pre_feedforward_layernorm"),
    ),
    Family(
        "cohere", "Cohere", Code("Cohere"), norms=LayerNorms(before_mlp=None), adjacent_pairs=True, parallel=True,
        requires=(_NOT_NORMED,),
    ),
    Family(
        "cwm", "Cwm", Code("CWM", arguments=(FROM_ATTENTION,), layer_types=True), kinds.first_of_four,
        {"num_key_value_heads": 8, "head_dim": 128, "sliding_window": 8192},
    ),
    Family("jais2", "Jais2", Code("Jais 2")),
    Family(
        "gemma2", "Gemma2",
        Code("Gemma 2", arguments=(FROM_ATTENTION, "softcap=self.attn_logit_softcapping"), layer_types=True),
        kinds.alternating, _GEMMA, norms=SANDWICH, requires=(_CAUSAL,),
    ),
    Family(
        "gemma3_text", "Gemma3",
        Code(
            "Gemma 3", module="gemma3", model="TextModel", config="TextConfig", arguments=(FROM_ATTENTION,),
            layer_types=True,
        ),
        kinds.five_to_one, _GEMMA | {"num_attention_heads": 8, "hidden_size": 2304},
        qk_norm=True, norms=SANDWICH, requires=(_CAUSAL,),
    ),
    Family(
        "phi3", "Phi3",
        Code("Phi-3", fused=_PHI3_SIZES, arguments=(FROM_CONFIG,), tensor_parallel=_PHI3_PLAN),
        kinds.windowed, fused="qkv_proj",
    ),
    Family("olmo2", "Olmo2", Code("OLMo 2", norm_whole=True), qk_norm=True, norms=POST_NORM),
    Family(
        "olmo3", "Olmo3", Code("OLMo 3", arguments=(FROM_ATTENTION,), layer_types=True, norm_whole=True),
        kinds.three_to_one, {"sliding_window": 4096}, qk_norm=True, norms=POST_NORM,
    ),
    Family("glm", "Glm", Code("GLM"), defaults=_GLM, adjacent_pairs=True),
    Family("glm4", "Glm4", Code("GLM-4"), defaults=_GLM, norms=_GLM4_NORMS, adjacent_pairs=True),
    Family("ernie4_5", "Ernie4_5", Code("ERNIE 4.5"), defaults=_GLM, adjacent_pairs=True),
    Family(
        "cohere2", "Cohere2",
        Code("Cohere 2", rope="self.sliding_window is not None", arguments=(FROM_ATTENTION,), layer_types=True),
        kinds.only_windows_rotate, {"sliding_window": 4096}, norms=LayerNorms(before_mlp=None),
        adjacent_pairs=True, parallel=True,
    ),
    Family(
        "exaone4", "Exaone4",
        Code(
            "EXAONE 4", rope="self.sliding_window is None or self.is_sliding",
            arguments=("sliding_window=self.sliding_window if self.is_sliding else None",), layer_types=True,
        ),
        kinds.only_windows_rotate, {"num_key_value_heads": 32, "sliding_window": 4096}, qk_norm=True, norms=POST_NORM,
    ),
    Family(
        "seed_oss", "SeedOss", Code("Seed-OSS", output=_DROPPED_OUT),
        defaults={"num_key_value_heads": 8, "head_dim": 128},
    ),
    Family("arcee", "Arcee", Code("Arcee")),
    Family(
        "apertus", "Apertus", Code("Apertus"), qk_norm=True,
        norms=LayerNorms("attention_layernorm", "feedforward_layernorm"),
    ),
    Family(
        "hunyuan_v1_dense", "HunYuanDenseV1", Code("HunYuan", norm_rotated=True), qk_norm=True,
        qk_norm_names=("query_layernorm", "key_layernorm"),
    ),
    Family("nemotron", "Nemotron", Code("Nemotron", layer_forward=_PRE_NORM_FORWARD)),
    Family("granite", "Granite", Code("Granite")),
    Family(
        "smollm3", "SmolLM3", Code("SmolLM3", rope="self.use_rope", arguments=(FROM_ATTENTION,), layer_types=True),
        kinds.some_without_rope, {"num_key_value_heads": 4, "no_rope_layer_interval": 4},
    ),
    Family(
        "starcoder2", "Starcoder2", Code("StarCoder2", arguments=(FROM_CONFIG,), output=_DROPPED_OUT),
        kinds.windowed, {"num_key_value_heads": 2},
    ),
    Family(
        "gpt_bigcode", "GPTBigCode",
        Code(
            "GPTBigCode", layer="Block", dropout="attn_dropout", rope="none", output="self.resid_dropout({})",
            fused=Fused("self.embed_dim, self.embed_dim", "self.embed_dim, self.kv_dim"),
        ),
        defaults={"num_key_value_heads": 1}, layers="transformer.h", attention="attn",
        o_proj="c_proj", fused="c_attn", norms=LayerNorms("ln_1", "ln_2"), keys=_GPT2_KEYS, requires=(_MULTI_QUERY,),
    ),
    Family(
        "lfm2", "Lfm2", Code("LFM2", layer_types=True, dropout=None), kinds.convolutions_between,
        {"num_key_value_heads": 8}, **_LFM2,
    ),
    Family(
        "lfm2_moe", "Lfm2Moe", Code("LFM2 MoE", layer_types=True, dropout=None, experts=True),
        kinds.convolutions_between, {"num_key_value_heads": 8}, **_LFM2,
    ),
    Family(
        "mixtral", "Mixtral", Code("Mixtral", arguments=(FROM_CONFIG,), experts=True), kinds.windowed,
        {"num_key_value_heads": 8},
    ),
    Family(
        "qwen2_moe", "Qwen2Moe", Code("Qwen2 MoE", experts=True, layer_types=True), kinds.early_windows,
        {"num_key_value_heads": 16, "sliding_window": 4096, "max_window_layers": 28},
    ),
    Family(
        "qwen3_moe", "Qwen3Moe", Code("Qwen3 MoE", arguments=(FROM_ATTENTION,), experts=True),
        kinds.optional_window, {"num_key_value_heads": 4, "sliding_window": 4096}, qk_norm=True,
    ),
    Family(
        "qwen3_next", "Qwen3Next", Code("Qwen3-Next", experts=True, layer_types=True), kinds.linear_but_every_fourth,
        {"num_key_value_heads": 2, "head_dim": 256}, state=states.gated_delta, qk_norm=True, gated=True,
    ),
    Family(
        "qwen3_5_text", "Qwen3_5",
        Code("Qwen3.5", module="qwen3_5", model="TextModel", config="TextConfig", layer_types=True),
        kinds.linear_but_every_fourth, {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256},
        state=states.gated_delta, qk_norm=True, gated=True,
    ),
    Family(
        "qwen3_5_moe_text", "Qwen3_5Moe",
        Code(
            "Qwen3.5 MoE", module="qwen3_5_moe", model="TextModel", config="TextConfig", layer_types=True, experts=True,
        ),
        kinds.linear_but_every_fourth, {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256},
        state=states.gated_delta, qk_norm=True, gated=True,
    ),
    Family(
        "ernie4_5_moe", "Ernie4_5_Moe", Code("ERNIE 4.5 MoE", experts=True), defaults={"num_key_value_heads": 4},
        adjacent_pairs=True,
    ),
    Family("flex_olmo", "FlexOlmo", Code("FlexOlmo", norm_whole=True, experts=True), qk_norm=True, norms=POST_NORM),
    Family(
        "dots1", "Dots1",
        Code("dots.llm1", arguments=(FROM_ATTENTION,), layer_types=True, experts=True, router="TopkRouter"),
        kinds.late_windows,
        {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 62, "use_sliding_window": True},
        qk_norm=True,
    ),
    Family(
        "exaone_moe", "ExaoneMoe",
        Code(
            "K-EXAONE", rope="self.sliding_window is None or self.is_sliding",
            arguments=("sliding_window=self.sliding_window if self.is_sliding else None",), layer_types=True,
            experts=True, router="TopkRouter",
        ),
        kinds.only_windows_rotate, {"num_key_value_heads": 32, "sliding_window": 4096}, qk_norm=True,
    ),
    Family(
        "hy_v3", "HYV3", Code("HunYuan 3", experts=True), defaults={"num_key_value_heads": 8, "head_dim": 128},
        qk_norm=True,
    ),
    Family(
        "mellum", "Mellum", Code("Mellum", arguments=(FROM_ATTENTION,), layer_types=True, experts=True),
        kinds.listed_or_full, {"num_key_value_heads": 4, "head_dim": 128, "sliding_window": 1024}, qk_norm=True,
    ),
    Family(
        "minimax_m2", "MiniMaxM2", Code("MiniMax M2", norm_whole=True, experts=True),
        defaults={"num_key_value_heads": 8, "head_dim": 128}, qk_norm=True,
    ),
    Family("phimoe", "Phimoe", Code("Phi-3.5 MoE", experts=True), kinds.windowed, {"num_key_value_heads": 8}),
    Family(
        "solar_open", "SolarOpen", Code("Solar Open", experts=True, router="TopkRouter"),
        defaults={"num_key_value_heads": 8, "head_dim": 128},
    ),
    Family(
        "olmoe", "Olmoe", Code("OLMoE", arguments=(FROM_CONFIG,), norm_whole=True, experts=True),
        qk_norm=True, requires=(_NOT_CLIPPED,),
    ),
    Family("granitemoe", "GraniteMoe", Code("Granite MoE", experts=True), mlp="block_sparse_moe"),
    Family(
        "glm4_moe", "Glm4Moe", Code("GLM-4 MoE", experts=True, router="TopkRouter"),
        defaults={"num_key_value_heads": 8}, requires=(_NO_QK_NORM,),
    ),
    Family(
        "gpt_oss", "GptOss",
        Code(
            "GPT-OSS", arguments=(FROM_ATTENTION, "s_aux=self.sinks"), layer_types=True, experts=True,
            stored_apart=False,
        ),
        kinds.alternating, {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128},
        sinks=True, half_tables=True,
    ),
]  # fmt: skip
