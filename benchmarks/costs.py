"""What the shipped recipes take, by size of model and GPU; and what sizes take: the first tables of docs/costs.md.

    python benchmarks/costs.py            # on any machine; reads no weights and no network

Memory is the forecast that `uptrain` makes before it begins (training/memory.py). Minutes are model FLOPs over the data
sheet's peak (training/flops.py) times a share: what the runs of docs/measurements.md reached.
"""

from typing import Any

from cla_convert.conversion.sharing import sharing_map
from cla_convert.models.export import cla_config
from cla_convert.models.families import FAMILIES
from cla_convert.models.shape import shape_of
from cla_convert.recipe import Recipe, Train
from cla_convert.recipe_file import load_recipe
from cla_convert.recipes import find_recipe
from cla_convert.training.flops import PEAK_BFLOAT16, training_flops
from cla_convert.training.layout import Layout
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
SHAPES |= {"smollm2-135m-3x": SHAPES["smollm2-135m"], "qwen3-8b-8gpu": SHAPES["qwen3-8b"]}
MEASURED = {("smollm2-135m", "H100"): 2, ("smollm2-135m-3x", "H100"): 3, ("gemma-3-270m", "H100"): 5}
"""Recipe and GPU -> minutes that it took (docs/measurements.md)."""


SIZES = {
    "135M": SHAPES["smollm2-135m"],
    "1B": SHAPES["llama-3.2-1b"],
    "8B": decoder("llama", 4096, 14336, 32, (32, 8, 128), 128256) | UNTIED,
    "70B": decoder("llama", 8192, 28672, 80, (64, 8, 128), 128256) | UNTIED,
}
"""Shapes of Llama's kind."""
SEVERAL, RECOMPUTED = 0.9, 0.75
"""Shares of the speed that are left: of each of several GPUs (two reached 1.83 times one, four 3.67), and with
activations recomputed."""


def main() -> None:
    """Print both tables."""
    print("| model | trained | GPUs of 79 GiB | GiB on each | H100, tokens/s | A100, tokens/s |")
    print("|---|---|---|--:|--:|--:|")
    for name, config in SIZES.items():
        for parameters in ("attention", "all"):
            print(size_row(name, config, parameters), flush=True)
    columns = [f"{gpu}, {room} GiB" for gpu, room in GPUS.items()]
    print("\n| recipe | KV bytes a token | trained | " + " | ".join(columns) + " |")
    print("|---|---|---|" + "--:|" * len(columns))
    for name, config in SHAPES.items():
        print(row(name, config), flush=True)


def size_row(name: str, config: dict[str, Any], parameters: str) -> str:
    """The fewest GPUs that train this shape, and how fast: activations kept if there is room, else recomputed."""
    train = load_recipe(find_recipe("default"), [f"train.parameters={parameters}", "source.model=x"]).recipe.train
    for processes in (1, 2, 4, 8, 16, 32, 64):
        for recomputed in (False, True):
            foreseen = forecast(train.model_copy(update={"activation_checkpointing": recomputed}), config, processes)
            if rows := most_rows(foreseen, GPUS["H100"]):
                gib = (foreseen.needs(rows).peak + CONTEXT) / GIB
                slower = RECOMPUTED if recomputed else 1.0
                speed = " | ".join(two_digits(slower * rate(foreseen, gpu)) for gpu in ("H100", "A100"))
                how = f"{processes}{', recomputing' if recomputed else ''}"
                return f"| {name} | {parameters} | {how} | {gib:.0f} | {speed} |"
    return f"| {name} | {parameters} | more than 64 | | | |"


def two_digits(value: float) -> str:
    """8865 -> 8,900."""
    return f"{float(f'{value:.2g}'):,.0f}"


def row(name: str, config: dict[str, Any]) -> str:
    """A line of the table."""
    recipe = load_recipe(find_recipe(name)).recipe
    sources, heads = pairs(recipe, config), recipe.convert.kv_heads
    before = shape_of(config).kv_bytes_per_token(2)
    fewer = config | {"num_key_value_heads": heads or config["num_key_value_heads"]}
    after = shape_of(fewer).kv_bytes_per_token(2, len(set(sources)))
    foreseen = forecast(recipe.train, config, recipe.train.processes, sources, heads)
    cells = [cell(foreseen, gpu, room, MEASURED.get((name, gpu))) for gpu, room in GPUS.items()]
    cache = f"{before:,} -> {after:,} ({before / after:.2f}x)"
    gpus = f", {recipe.train.processes} GPUs" if recipe.train.processes > 1 else ""
    return f"| `{name}` | {cache} | {recipe.train.parameters}{gpus} | {' | '.join(cells)} |"


def forecast(
    train: Train, config: dict[str, Any], processes: int, sources: list[int] | None = None, heads: int | None = None
) -> Forecast:
    """Of a training in bfloat16 with compiled layers; the teacher of several GPUs is divided, too."""
    sources = sources or sharing_map("cla2-keep-ends", shape_of(config).kinds)
    student = cla_config(config, FAMILIES[config["model_type"]], sources, "bfloat16", heads)
    train = train.model_copy(update={"precision": "bfloat16", "micro_batch_size": "auto"})
    layout = Layout.of(train, processes).with_teacher(divided=processes > 1)
    foreseen = Forecast(train, student, config, "cuda", layout)
    foreseen.compiled = True
    return foreseen


def pairs(recipe: Recipe, config: dict[str, Any]) -> list[int]:
    """The recipe's map; where it is measured (`auto`), regular pairs, which are as large."""
    sharing = recipe.convert.sharing
    return sharing_map("cla2-keep-ends" if sharing == "auto" else sharing, shape_of(config).kinds)


def cell(foreseen: Forecast, gpu: str, room: int, measured: int | None = None) -> str:
    """Minutes and memory on one GPU, or on the recipe's, measured minutes in bold; what would fit if it does not."""
    if rows := most_rows(foreseen, room):
        seconds = foreseen.budget.tokens / rate(foreseen, gpu)
        minutes = f"**{measured} min**" if measured else f"{max(1, round(seconds / 60))} min"
        return f"{minutes}, {(foreseen.needs(rows).peak + CONTEXT) / GIB:.0f} GiB"
    if foreseen.train.parameters == "attention" or foreseen.layout.processes > 1:
        return "no"
    less = foreseen.given(parameters="attention")
    less.compiled = True
    return f"no; attention only: {cell(less, gpu, room)}"


def most_rows(foreseen: Forecast, room: int) -> int:
    """Sequences in a pass, as `train.micro_batch_size: auto` chooses; 0 if not one fits."""
    length, processes = foreseen.budget.length, foreseen.layout.processes
    share_of_step = max(1, foreseen.train.batch_tokens // length // processes)
    return foreseen.largest((1 - SPARE) * room * GIB, max(1, min(ENOUGH // length, share_of_step)))


def rate(foreseen: Forecast, gpu: str) -> float:
    """Tokens a second, by rule."""
    processes = foreseen.layout.processes
    flops = training_flops(foreseen.student, foreseen.teacher, foreseen.budget.length)
    return processes * (SEVERAL if processes > 1 else 1) * share(foreseen) * PEAK_BFLOAT16[gpu] / flops


def share(forecast: Forecast) -> float:
    """Of the peak: narrow models have short matrix products."""
    return 0.3 if forecast.student.config.hidden_size < 1024 else 0.45


if __name__ == "__main__":
    main()
