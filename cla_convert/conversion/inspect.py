"""What a model is, from its configuration alone: supported or why not, and the KV bytes per token of each pattern."""

from pathlib import Path
from typing import Any

from ..errors import ClaError, InputError
from ..models.checkpoint import FLOATING, Checkpoint
from ..models.families import family_of
from ..models.shape import AttentionShape, shape_of
from ..models.source import resolve_source
from .sharing import groups_of, sharing_map

PATTERNS = ["cla2", "cla3", "cla4", "cla2-keep-ends", "cla3-keep-ends", "dense-front", "dense-back"]


def inspect_model(model: str, *, revision: str | None = None) -> dict[str, Any]:
    """Describe a model (the keys of `inspect --json`). Raises InputError if it cannot be read at all."""
    checkpoint = Checkpoint.open(resolve_source(model, revision=revision, allow_pickle=False))
    shape = shape_of(checkpoint.config)
    try:
        family_of(checkpoint.config)
        reason = None
    except InputError as error:
        reason = f"{error.what}. {error.fix}"
    largest = max(checkpoint.tensors.values(), key=lambda info: info.numel)
    size = largest.nbytes // largest.numel
    return {
        "model": model,
        "folder": str(Path(checkpoint.folder)),
        "model_type": shape.model_type,
        "supported": reason is None,
        "reason": reason,
        "num_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "dtype": FLOATING.get(largest.dtype, largest.dtype),
        "parameters": sum(info.numel for info in checkpoint.tensors.values()),
        "layer_kinds": {kind: shape.kinds.count(kind) for kind in dict.fromkeys(shape.kinds)},
        "kv_bytes_per_token": shape.kv_bytes_per_token(size),
        "kv_source_layers": list(shape.kv_source_layers),
        "patterns": _patterns(shape, size),
    }


def render(result: dict[str, Any]) -> str:
    """The description for a person."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in result["layer_kinds"].items())
    lines = [
        f"{result['model']}: {result['model_type']}, {result['parameters'] / 1e6:.0f}M parameters in {result['dtype']}",
        f"supported   {'yes' if result['supported'] else 'no: ' + result['reason']}",
        f"layers      {result['num_layers']} ({kinds})",
        f"heads       {result['num_attention_heads']} query / {result['num_key_value_heads']} KV"
        f" of {result['head_dim']} channels",
        f"KV cache    {result['kv_bytes_per_token']} bytes per token",
    ]
    for name, pattern in result["patterns"].items():
        lines.append(f"  {name:<18}{pattern['kv_bytes_per_token']:>8} bytes, {pattern['kv_layers']} KV layers")
    return "\n".join(lines)


def _patterns(shape: AttentionShape, size: int) -> dict[str, dict[str, int]]:
    patterns = {}
    for name in PATTERNS:
        try:
            owners = len(groups_of(sharing_map(name, shape.kinds)))
        except ClaError:
            continue  # impossible for this model
        patterns[name] = {"kv_layers": owners, "kv_bytes_per_token": shape.kv_bytes_per_token(size, owners)}
    return patterns
