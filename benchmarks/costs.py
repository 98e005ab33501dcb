"""What the shipped recipes take, by size of model and GPU: docs/costs.md.

    python benchmarks/costs.py            # on any machine; reads no weights and no network

Memory is the forecast that `uptrain` makes before it begins (training/memory.py). Minutes are model FLOPs over the data
sheet's peak (training/flops.py) times a share: what the runs of docs/measurements.md reached.
"""

from typing import Any

from cla_convert.conversion.sharing import sharing_map
from cla_convert.models.export import cla_config
from cla_convert.models.families import FAMILIES
from cla_convert.models.shape import shape_of
from cla_convert.recipe import Recipe
from cla_convert.recipe_file import load_recipe
from cla_convert.recipes import find_recipe
from cla_convert.training.flops import PEAK_BFLOAT16, training_flops
from cla_convert.training.memory import CONTEXT, Forecast

GPUS = {"RTX 4090": 24, "A100": 79, "H100": 79}
"""Name in the table of peaks -> GiB that a driver reports."""
GIB = 2**30
SPARE, ENOUGH = 0.1, 32_768
"""As `train.micro_batch_size: auto` chooses: a tenth of the memory stays free, 32k tokens a pass are enough."""


def decoder(kind: str, width: int, inner: int, layers: int, heads: tuple[int, int, int], vocab: int) -> dict[str, Any]:
    """A config.json as far as sizes go; `heads`: of queries, of keys, channels."""
    return {
        "model_type": kind, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": heads[2], "vocab_size": vocab,
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "dtype": "bfloat16", "pad_token_id": 0,
    }  # fmt: skip


UNTIED = {"tie_word_embeddings": False}
SHAPES = {
    "smollm2-135m": decoder("llama", 576, 1536, 30, (9, 3, 64), 49152),
    "gemma-3-270m": decoder("gemma3_text", 640, 2048, 18, (4, 1, 256), 262144) | {"sliding_window": 512},
    "qwen3-0.6b": decoder("qwen3", 1024, 3072, 28, (16, 8, 128), 151936),
    "gemma-3-1b": decoder("gemma3_text", 1152, 6912, 26, (4, 1, 256), 262144) | {"sliding_window": 512},
    "tinyllama-cla2": decoder("llama", 2048, 5632, 22, (32, 4, 64), 32000) | UNTIED,
    "llama-3.2-1b": decoder("llama", 2048, 8192, 16, (32, 8, 64), 128256),
    "qwen3-1.7b": decoder("qwen3", 2048, 6144, 28, (16, 8, 128), 151936),
    "smollm3-3b": decoder("smollm3", 2048, 11008, 36, (16, 4, 128), 128256) | {"no_rope_layer_interval": 4},
    "qwen3-8b": decoder("qwen3", 4096, 12288, 36, (32, 8, 128), 151936) | UNTIED,
}
"""Recipe -> shape of its model."""


def main() -> None:
    """Print the table."""
    columns = [f"{gpu}, {room} GiB" for gpu, room in GPUS.items()]
    print("| recipe | KV bytes a token | trained | " + " | ".join(columns) + " |")
    print("|---|---|---|" + "--:|" * len(columns))
    for name, config in SHAPES.items():
        print(row(name, config), flush=True)


def row(name: str, config: dict[str, Any]) -> str:
    """A line of the table."""
    recipe = load_recipe(find_recipe(name)).recipe
    shape = shape_of(config)
    sources = pairs(recipe, config)
    before, after = (shape.kv_bytes_per_token(2, owners) for owners in (len(sources), len(set(sources))))
    student = cla_config(config, FAMILIES[config["model_type"]], sources, "bfloat16")
    train = recipe.train.model_copy(update={"precision": "bfloat16", "micro_batch_size": "auto"})
    forecast = Forecast(train, student, config, "cuda")
    forecast.compiled = True
    cells = [cell(forecast, gpu, room) for gpu, room in GPUS.items()]
    cache = f"{before:,} -> {after:,} ({before / after:.2f}x)"
    return f"| `{name}` | {cache} | {train.parameters} | {' | '.join(cells)} |"


def pairs(recipe: Recipe, config: dict[str, Any]) -> list[int]:
    """The recipe's map; where it is measured (`auto`), regular pairs, which are as large."""
    sharing = recipe.convert.sharing
    return sharing_map("cla2-keep-ends" if sharing == "auto" else sharing, shape_of(config).kinds)


def cell(forecast: Forecast, gpu: str, room: int) -> str:
    """Minutes and memory on one GPU; what would fit if it does not."""
    length = forecast.budget.length
    rows = forecast.largest((1 - SPARE) * room * GIB, max(1, ENOUGH // length))
    if rows:
        flops = training_flops(forecast.student, forecast.teacher, length)
        seconds = forecast.budget.tokens * flops / (share(forecast) * PEAK_BFLOAT16[gpu])
        return f"{max(1, round(seconds / 60))} min, {(forecast.needs(rows).peak + CONTEXT) / GIB:.0f} GiB"
    if forecast.train.parameters == "attention":
        return "no"
    less = forecast.given(parameters="attention")
    less.compiled = True
    return f"no; attention only: {cell(less, gpu, room)}"


def share(forecast: Forecast) -> float:
    """Of the peak: narrow models have short matrix products."""
    return 0.3 if forecast.student.config.hidden_size < 1024 else 0.45


if __name__ == "__main__":
    main()
