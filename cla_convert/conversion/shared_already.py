"""Models whose layers share keys and values as they are (Gemma 3n, Gemma 4, our own): who reads whom, what is left."""

import re
from collections.abc import Mapping
from typing import Any

from ..errors import ClaError
from ..models.checkpoint import Checkpoint
from ..models.shape import AttentionShape, owners_of
from ..recipe import Convert
from .sharing import groups_of, sharing_map

_KEYS = re.compile(r"(?:model\.|language_model\.)*layers\.(\d+)\.self_attn\.k_proj\.weight")


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of an unsupported model's config.json that tells its layers, under the `model_type` of the whole."""
    text = config.get("text_config")
    return {**text, "model_type": config.get("model_type")} if isinstance(text, dict) else config


def stored_rows(checkpoint: Checkpoint, shape: AttentionShape) -> list[int]:
    """Numbers that a token adds to the cache of each layer, by the projections that are stored (Gemma 4's differ)."""
    rows = [2 * shape.num_key_value_heads * shape.head_dim] * shape.num_layers
    for name, info in checkpoint.tensors.items():
        match = _KEYS.fullmatch(name)
        if match and int(match[1]) < len(rows) and info.shape:
            rows[int(match[1])] = 2 * info.shape[0]  # values are as many, or are made of the keys
    return rows


def sharing(shape: AttentionShape) -> dict[str, Any] | None:
    """Who reads whom, and how many layers would keep K/V if the owners shared by the default pattern, too."""
    groups = [group for group in groups_of(list(shape.kv_source_layers)) if len(group) > 1]
    if not groups:
        return None
    owners = owners_of(shape.kv_source_layers)
    pattern = Convert.model_fields["sharing"].default
    try:
        left = len(owners_of(sharing_map(pattern, [shape.kinds[owner] for owner in owners])))
    except ClaError:  # too few layers
        left = len(owners)
    return {"groups": groups, "kv_layers": len(owners), "left": {"sharing": pattern, "kv_layers": left}}


def render_sharing(found: Mapping[str, Any], layers: int) -> list[str]:
    """The same for a person."""
    owners, left = found["kv_layers"], found["left"]
    read = ", ".join(f"{owner} (by {_ranges(readers)})" for owner, *readers in found["groups"])
    return [
        f"shares      {owners} of {layers} layers keep K/V; others read theirs: {read}",
        f"            {left['sharing']} among those {owners} would leave {left['kv_layers']}: "
        f"{owners / left['kv_layers']:.2f}x smaller",
    ]


def _ranges(layers: list[int]) -> str:
    """`[1, 2, 3, 7]` -> `1-3, 7`."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
