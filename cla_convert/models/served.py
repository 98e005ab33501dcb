"""Which releases of vLLM served which families, as tests/vllm found. The others of docs/serving.md were read."""

_SINCE_0_26 = (
    "llama",
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "olmo3",
    "glm",
    "glm4",
    "ernie4_5",
    "cohere2",
    "exaone4",
    "seed_oss",
    "arcee",
    "granite",
    "smollm3",
    "starcoder2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "cohere",
    "cwm",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "gemma",
    "jais2",
    "solar_open",
    "vaultgemma",
)
SERVED = {
    "0.26": _SINCE_0_26,
    "0.32": (
        *_SINCE_0_26,
        "ministral3",
        "apertus",
        "hunyuan_v1_dense",
        "nemotron",
        "gpt_bigcode",
        "olmoe",
        "granitemoe",
        "glm4_moe",
        "gpt_oss",
        "mellum",
    ),
}
"""Release -> families."""
FAILS: dict[str, tuple[str, ...]] = {
    "0.26": ("hy_v3", "mellum", "minimax_m2", "phimoe"),
    "0.32": ("hy_v3", "minimax_m2", "phimoe"),
}
"""Release -> families whose experts its Transformers backend does not run; the plugin refuses them.

Under 0.32 for CPUs whatever the size of the experts: HunYuan 3 and MiniMax M2 choose them by sigmoid, where its kernels
know softmax, and have the bias that chooses outside of the part that vLLM replaces; the router of Phi-3.5 MoE is taken
for a linear layer.
"""


def served_by(family: str) -> list[str]:
    """Releases that a family was served by."""
    return [release for release, families in SERVED.items() if family in families]
