"""A tiny model of every family and what conversion makes of it: `python -m tests.vllm.conversions FOLDER`.

Run by the converter's Python, as models are: converted in one environment, served from another. FOLDER/CASE/ gets
`source`, `cla2` and, where KV heads can be pooled, `cla2-heads`, in which half of them or fewer are left.
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

SHAPE: dict[str, Any] = {"hidden_size": 128, "head_dim": 32}
"""vLLM's attention for CPUs takes heads of 32 channels or more."""
SHAPES: dict[str, dict[str, Any]] = {
    "llama-odd": {"hidden_size": 192, "head_dim": 32},
    "phi3": {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    "phi3-partial": {"hidden_size": 128, "head_dim": 32},
    "gpt_bigcode": {"hidden_size": 128},
    "olmoe": SHAPE | {"moe_intermediate_size": ABSENT},  # as published; vLLM would take it for the experts' size
}


def main(folder: Path) -> None:
    """Write all of them, and how many bytes of KV cache a token was promised to take (`promised.json`)."""
    for case in CASES:
        source = Checkpoint.open(save_tiny(case, folder / case / "source", **SHAPES.get(case, SHAPE)))
        plans = {"cla2": make_plan(source, sharing="cla2", init="mean")}
        with suppress(InputError):  # the family cannot have fewer heads
            for heads in possible_heads(shape_of(source.config))[-1:]:
                plans["cla2-heads"] = make_plan(source, sharing="cla2", init="mean", kv_heads=heads)
        for kind, plan in plans.items():
            convert(plan, source, folder / case / kind)
        promised = {"source": plans["cla2"].kv_bytes_per_token["before"]}
        promised |= {kind: plan.kv_bytes_per_token["after"] for kind, plan in plans.items()}
        (folder / case / "promised.json").write_text(json.dumps(promised))
    for kind in ("cla2", "cla2-heads"):
        (folder / "llama" / f"{kind}.json").write_text(json.dumps(counted(folder / "llama" / kind)))


def counted(folder: Path) -> dict[str, Any]:
    """What other commands measure of a converted model."""
    kv, cache = kv_cache_of(load_model(folder)), measure_cache(folder)
    return {"bench": kv["bytes_per_token"], "verify": {k: size / cache["tokens"] for k, size in cache["bytes"].items()}}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
