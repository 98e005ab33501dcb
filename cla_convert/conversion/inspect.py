"""What a model is, from headers alone: supported or why not, and the KV bytes per token of each pattern."""

from collections.abc import Iterable, Sequence
from typing import Any

from ..console import command, human_bytes, human_count
from ..errors import ClaError, InputError
from ..models.checkpoint import Checkpoint
from ..models.headers import ELEMENT_SIZE, FLOATING, TensorInfo
from ..models.kinds import SLIDING, has_kv
from ..models.shape import AttentionShape, owners_of, shape_of
from ..models.source import open_headers
from ..recipe import Convert
from ..tables import table
from .kv_heads import possible_heads
from .pattern import PATTERNS
from .shared_already import language_config, render_sharing, sharing, stored_rows
from .sharing import sharing_map
from .supported import check_convertible


def inspect_model(model: str, *, revision: str | None = None, allow_pickle: bool = False) -> dict[str, Any]:
    """Describe a model (the keys of `inspect --json`). Raises InputError if it cannot be read at all.

    Of a supported family everything is known. Of others the description goes as far as the usual keys of a config.json;
    the sizes are null where it has none of them.
    """
    checkpoint = open_headers(model, revision=revision, allow_pickle=allow_pickle)
    if not checkpoint.tensors:
        raise InputError(f"{model} holds no tensors of a language model", fix="Download it again.")
    reason = _reason(checkpoint)
    largest = max(checkpoint.tensors.values(), key=lambda info: info.numel)
    description = {
        "model": model,
        "folder": str(checkpoint.folder),
        "model_type": checkpoint.config.get("model_type"),
        "architectures": checkpoint.config.get("architectures"),
        "supported": reason is None,
        "reason": reason,
        "dtype": FLOATING.get(largest.dtype, largest.dtype),
        "parameters": sum(info.numel for info in checkpoint.tensors.values()),
        "whole": _whole(checkpoint),
    }
    try:
        shape = shape_of(checkpoint.config if reason is None else language_config(checkpoint.config))
        return description | _attention(checkpoint, shape, _cache_size(checkpoint, largest), reason is None)
    except InputError:
        if reason is None:
            raise
        return description | dict.fromkeys(_ATTENTION_KEYS) | {"layer_kinds": {}, "kv_head_counts": [], "patterns": {}}


def _whole(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What stands around the language model, which all else is about; None for a model that only reads."""
    if not (outside := checkpoint.around):
        return None
    return {
        "model_type": outside.config["model_type"],
        "name": outside.whole.name,
        "architectures": outside.config.get("architectures"),
        "tensors": len(checkpoint.others),
        "parameters": sum(info.numel for info in checkpoint.others.values()),
    }


def render(result: dict[str, Any], more: str = "", width: int = 80) -> str:
    """The description for a person whose screen has so many columns, with `more` before what to do next."""
    count = human_count(result["parameters"])
    what = f"{result['model']}: {result['model_type']}, {count} parameters in {result['dtype']}"
    lines = [what, "supported   yes"] if result["supported"] else [f"supported: no. {result['reason']}", what]
    if whole := result["whole"]:
        others = f"{whole['tensors']} other tensors ({human_count(whole['parameters'])} parameters)"
        lines.insert(1, f"inside      {whole['name']} ({whole['model_type']}), whose {others} stay as they are")
    if result["num_layers"] is None:
        return "\n".join(lines)
    kinds = ", ".join(f"{count} {kind}" for kind, count in result["layer_kinds"].items())
    lines += [
        f"layers      {result['num_layers']} ({kinds})",
        f"heads       {result['num_attention_heads']} query / {result['num_key_value_heads']} KV"
        f" of {result['head_dim']} channels",
        f"KV cache    {_bytes(result)} in {result['dtype']}",
    ]
    if state := result["state_bytes"]:
        without = sum(count for kind, count in result["layer_kinds"].items() if not has_kv(kind))
        lines.append(
            f"state       {state} bytes per sequence, of {without} layers without attention, which stay as they are"
        )
    if result["shares"]:
        lines += render_sharing(result["shares"], result["num_layers"])
    if window := result["sliding_window"]:
        lines.append(f"            sliding layers keep only their window: {window} tokens, then they stop growing")
    default = Convert.model_fields["sharing"].default
    lines += [_choices(result, default, width)] if result["patterns"] else []
    if fewer := result["kv_head_counts"]:
        counts = ", ".join(f"{count}: {result['num_key_value_heads'] // count}x" for count in reversed(fewer))
        lines.append(f"--kv-heads  {counts} smaller, with any of these patterns or alone (cla1)")
        lines.append("            to be tried before cla3 (docs/sharing.md, Fewer KV heads)")
    if chosen := result["patterns"].get(default):
        before, after = (human_bytes(_SEQUENCES * _sequence_bytes(cache, window)) for cache in (result, chosen))
        lines.append(f"at {_SEQUENCES} contexts of {_CONTEXT} tokens: {before} -> {after} of KV cache with {default}")
    lines += [more] if more else []
    if result["supported"]:
        lines.append(f"next        {command('convert', result['model'], 'OUT')}")
    return "\n".join(lines)


def _choices(result: dict[str, Any], default: str, width: int) -> str:
    """The patterns, and what each saves."""
    windowed = result["kv_bytes_per_token_beyond_window"] != result["kv_bytes_per_token"]
    titles = ["sharing", "KV layers", "bytes per token", *["beyond the window"] * windowed, "smaller"]
    rows = []
    for name, pattern in result["patterns"].items():
        less = result["kv_bytes_per_token"] / pattern["kv_bytes_per_token"]
        counted = ("kv_layers", "kv_bytes_per_token", *["kv_bytes_per_token_beyond_window"] * windowed)
        mark = " (default)" if name == default else ""
        rows.append([name, *(str(pattern[key]) for key in counted), f"{less:.2f}x{mark}"])
    return table(titles, rows, numbers=[title not in ("sharing", "smaller") for title in titles], width=width)


_CONTEXT, _SEQUENCES = 8192, 32


def _sequence_bytes(cache: dict[str, Any], window: int | None) -> int:
    """Of a whole context: sliding layers stop growing at their window."""
    early = min(window or _CONTEXT, _CONTEXT)
    return early * cache["kv_bytes_per_token"] + (_CONTEXT - early) * cache["kv_bytes_per_token_beyond_window"]


_ATTENTION_KEYS = (
    "num_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "layer_kinds", "sliding_window",
    "kv_bytes_per_token", "kv_bytes_per_token_beyond_window", "state_bytes", "kv_source_layers", "shares",
    "kv_head_counts", "patterns",
)  # fmt: skip


def _attention(checkpoint: Checkpoint, shape: AttentionShape, size: int, supported: bool) -> dict[str, Any]:
    """The values of _ATTENTION_KEYS."""
    per_layer = [size * rows for rows in stored_rows(checkpoint, shape)]
    return {
        "num_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "layer_kinds": {kind: shape.kinds.count(kind) for kind in dict.fromkeys(shape.kinds)},
        "sliding_window": shape.sliding_window,
        **_cache(shape, shape.kv_source_layers, per_layer),
        "state_bytes": shape.state_bytes(size),
        "kv_source_layers": list(shape.kv_source_layers),
        "shares": sharing(shape),
        "kv_head_counts": possible_heads(shape) if supported else [],
        "patterns": _patterns(shape, per_layer) if supported else {},
    }


def _cache_size(checkpoint: Checkpoint, largest: TensorInfo) -> int:
    """Bytes of a number in the cache: as large as one of the weights; of quantised ones, as config.json says."""
    code = largest.dtype
    if code not in FLOATING:
        named = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
        code = {name: code for code, name in FLOATING.items()}.get(named, "BF16")
    return ELEMENT_SIZE[code]


def _reason(checkpoint: Checkpoint) -> str | None:
    """Why the model is not supported, if it is not."""
    try:
        check_convertible(checkpoint)
    except InputError as error:
        return " ".join(f"{part.rstrip('.')}." for part in (error.what, error.why, error.fix) if part)
    return None


def _patterns(shape: AttentionShape, per_layer: Sequence[int]) -> dict[str, dict[str, int]]:
    patterns = {}
    for name in PATTERNS.examples():
        try:
            sources = sharing_map(name, shape.kinds)
        except ClaError:
            continue  # impossible for this model
        patterns[name] = {"kv_layers": len(owners_of(sources)), **_cache(shape, sources, per_layer)}
    return patterns


def _cache(shape: AttentionShape, sources: Iterable[int | None], per_layer: Sequence[int]) -> dict[str, int]:
    """Bytes that one more token adds to the cache, before and after the sliding layers are full."""
    owners = owners_of(sources)
    growing = [owner for owner in owners if not shape.kinds[owner].startswith(SLIDING)]
    return {
        "kv_bytes_per_token": sum(per_layer[owner] for owner in owners),
        "kv_bytes_per_token_beyond_window": sum(per_layer[owner] for owner in growing),
    }


def _bytes(cache: dict[str, Any]) -> str:
    early, late = cache["kv_bytes_per_token"], cache["kv_bytes_per_token_beyond_window"]
    return f"{early} bytes per token" + (f", {late} beyond the window" if late != early else "")
