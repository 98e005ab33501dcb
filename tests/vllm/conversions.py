"""A tiny model of every family and what conversion makes of it: `python -m tests.vllm.conversions FOLDER`.

Run by the converter's Python, as models are: converted in one environment, served from another. FOLDER/CASE/ gets
`source`, `cla2` and, where KV heads can be pooled, `cla2-heads`, in which half of them or fewer are left. `whole` is a
model that sees images.
"""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from cla_convert.conversion.convert import convert
from cla_convert.conversion.kv_heads import possible_heads
from cla_convert.conversion.plan import make_plan
from cla_convert.errors import InputError
from cla_convert.evaluation.cache import kv_cache_of
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import load_model
from cla_convert.models.shape import shape_of
from cla_convert.models.verify import measure_cache
from tests.tiny import ABSENT, CASES, save_tiny
from tests.unit.test_wholes import save_whole

WHOLE = "gemma3"
SHAPE: dict[str, Any] = {"hidden_size": 128, "head_dim": 32}
"""vLLM's attention for CPUs takes heads of 32 channels or more."""
SHAPES: dict[str, dict[str, Any]] = {
    "llama-odd": {"hidden_size": 192, "head_dim": 32},
    "phi3": {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    "phi3-partial": {"hidden_size": 128, "head_dim": 32},
    "gpt_bigcode": {"hidden_size": 128},
    **{
        case: SHAPE | {"moe_intermediate_size": ABSENT}
        for case in ("flex_olmo", "minimax_m2", "phimoe", "phimoe-window")
    },
    "olmoe": SHAPE | {"moe_intermediate_size": ABSENT},  # as published; vLLM would take it for the experts' size
}


ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 64}
BY_LENGTH = {
    "longrope": (
        "phi3",
        {"max_position_embeddings": 512, "original_max_position_embeddings": 64,
         "rope_parameters": ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 16,
                                    "long_factor": [1.0 + n for n in range(16)]}},
    ),
    "dynamic": (
        "llama", {"max_position_embeddings": 64, "rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 6.0}},
    ),
}  # fmt: skip
"""RoPE with other frequencies beyond 64 tokens."""
WINDOWS = {
    "unused": ("vaultgemma", {"sliding_window": 8, "layer_types": ["full_attention"] * 6}),
    "unknown": ("llama", {"sliding_window": 8}),
}
"""A window in config.json that no layer has."""

EXPERT = {"moe_intermediate_size": 64}
"""vLLM 0.26 for CPUs takes no smaller ones."""


def shape(case: str) -> dict[str, Any]:
    """What a case gets instead of its own sizes."""
    return (EXPERT if "moe_intermediate_size" in CASES[case][1] else {}) | SHAPES.get(case, SHAPE)


def main(folder: Path) -> None:
    """Write all of them, and how many bytes of KV cache a token was promised to take (`promised.json`)."""
    for case in CASES:
        source = Checkpoint.open(save_tiny(case, folder / case / "source", **shape(case)))
        plans = {"cla2": make_plan(source, sharing="cla2", init="mean")}
        with suppress(InputError):  # the family cannot have fewer heads
            for heads in possible_heads(shape_of(source.config))[-1:]:
                plans["cla2-heads"] = make_plan(source, sharing="cla2", init="mean", kv_heads=heads)
        for kind, plan in plans.items():
            convert(plan, source, folder / case / kind)
        promised = {"source": plans["cla2"].kv_bytes_per_token["before"]}
        promised |= {kind: plan.kv_bytes_per_token["after"] for kind, plan in plans.items()}
        (folder / case / "promised.json").write_text(json.dumps(promised))
    for name, (case, more) in (BY_LENGTH | WINDOWS).items():
        source = Checkpoint.open(save_tiny(case, folder / name / "source", **shape(case) | more))
        convert(make_plan(source, sharing="cla2", init="mean"), source, folder / name / "cla2")
    save_whole(WHOLE, folder / "whole" / "source")
    source = Checkpoint.open(folder / "whole" / "source")
    convert(make_plan(source, sharing="cla2", init="mean"), source, folder / "whole" / "cla2")
    for kind in ("cla2", "cla2-heads"):
        (folder / "llama" / f"{kind}.json").write_text(json.dumps(counted(folder / "llama" / kind)))


def counted(folder: Path) -> dict[str, Any]:
    """What other commands measure of a converted model."""
    kv, cache = kv_cache_of(load_model(folder)), measure_cache(folder)
    return {"bench": kv["bytes_per_token"], "verify": {k: size / cache["tokens"] for k, size in cache["bytes"].items()}}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
