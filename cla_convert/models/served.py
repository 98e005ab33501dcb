"""Which releases of vLLM served which families, as tests/vllm found. The others of docs/serving.md were read."""

SERVED = {
    "0.26": (
        "llama",
        "mistral",
        "ministral",
        "qwen2",
        "gemma2",
        "glm",
        "glm4",
        "ernie4_5",
        "cohere2",
        "granite",
        "smollm3",
        "starcoder2",
        "mixtral",
    ),
    "0.32": (
        "llama",
        "mistral",
        "ministral",
        "ministral3",
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
        "apertus",
        "hunyuan_v1_dense",
        "nemotron",
        "granite",
        "smollm3",
        "starcoder2",
        "gpt_bigcode",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
        "granitemoe",
        "glm4_moe",
        "gpt_oss",
    ),
}
"""Release -> families."""


def served_by(family: str) -> list[str]:
    """Releases that a family was served by."""
    return [release for release, families in SERVED.items() if family in families]
