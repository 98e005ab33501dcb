"""config.json of models that people serve, as far as sizes go: for tables and benchmarks that need no weights."""

import json
from pathlib import Path
from typing import Any

from cla_convert.conversion.sharing import sharing_map
from cla_convert.models.export import cla_config
from cla_convert.models.families import FAMILIES
from cla_convert.models.shape import AttentionShape, shape_of

_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _LLAMA | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
                      "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1000},
    "1b": _LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                    "head_dim": 64, "tie_word_embeddings": True},
    "8b": _LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                    "num_attention_heads": 32},
    "70b": _LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                     "num_attention_heads": 64},
}  # fmt: skip
"""Llama 3's shapes, and a tiny one to try things with."""
_SIZES = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "head_dim", "vocab_size", "tie_word_embeddings", "rms_norm_eps"}  # fmt: skip


def sizes(name: str, layers: int | None = None) -> dict[str, Any]:
    """Of a shape, what makes a random Llama, with so many layers in place of its own."""
    found = {key: value for key, value in SHAPES[name].items() if key in _SIZES}
    return found | ({"num_hidden_layers": layers} if layers else {})


def parameters(config: dict[str, Any]) -> int:
    """Parameters of a Llama of this shape that shares nothing."""
    hidden, shape = config["hidden_size"], shape_of(config)
    rows = sum(shape.projection_rows.values())
    layer = hidden * (rows + shape.projection_rows["q_proj"] + 3 * config["intermediate_size"] + 2)
    embeddings = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    return layer * config["num_hidden_layers"] + embeddings + hidden


def converted(config: dict[str, Any], sharing: str) -> dict[str, Any]:
    """config.json after conversion with a sharing pattern."""
    sources = sharing_map(sharing, shape_of(config).kinds)
    return cla_config(config, FAMILIES[config["model_type"]], sources, "bfloat16")


def owners(config: dict[str, Any], sharing: str) -> int:
    """Layers that keep K/V."""
    return len(set(converted(config, sharing)["kv_source_layers"]))


def kv_bytes(config: dict[str, Any], sharing: str = "cla1") -> int:
    """Bytes of K and V in bfloat16 that a token adds."""
    shape: AttentionShape = shape_of(config)
    return shape.kv_bytes_per_token(2, owners(config, sharing))


def write_pair(name: str, sharing: str, folder: Path) -> tuple[Path, Path]:
    """Folders with the config.json of a shape and of its conversion, for engines that make up the weights."""
    source = SHAPES[name] | {"dtype": "bfloat16"}
    pair = folder / f"{name}", folder / f"{name}-{sharing}"
    for out, config in zip(pair, (source, converted(source, sharing)), strict=True):
        out.mkdir(parents=True)
        (out / "config.json").write_text(json.dumps(config, indent=1))
    return pair
