"""The table of docs/serving.md: KV bytes a token, and what memory holds, by shape and pattern.

    python benchmarks/kv_capacity.py

Computed from the shapes; `cla-convert bench`, `verify --cache` and the tests with vLLM hold such numbers to what is
allocated.
"""

from shapes import SHAPES, kv_bytes, owners, parameters

MEMORY = 80 * 10**9
PATTERNS = ("cla1", "cla2-keep-ends", "cla2", "cla3", "cla4")
MODELS = {"Llama 3 8B": "8b", "Llama 3 70B": "70b"}


def table() -> str:
    """Markdown."""
    lines = [
        "| shape, bfloat16 | sharing | layers with K/V | KV bytes a token | tokens in 80 GB of cache | "
        "of 8192 tokens, at once | beside its weights on one 80 GB GPU, at once |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for title, name in MODELS.items():
        config = SHAPES[name]
        left = MEMORY - 2 * parameters(config)
        for sharing in PATTERNS:
            size = kv_bytes(config, sharing)
            beside = f"{left // size // 8192}" if left > 0 else "the weights do not fit"
            label = "none" if sharing == "cla1" else f"`{sharing}`"
            count = f"{owners(config, sharing)} of {config['num_hidden_layers']}"
            lines.append(
                f"| {title} | {label} | {count} | {size:,} | {MEMORY // size:,} | {MEMORY // size // 8192} | {beside} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
