"""Sharing patterns and the sharing map (`kv_source_layers`): entry i is the layer whose K/V layer i reads.

`kinds` gives each layer's attention kind (sliding or full, RoPE or not, head shape). Only layers of one kind can share,
so "adjacent" always means adjacent among the layers of a kind.
"""

import json
import re
from collections.abc import Hashable, Sequence

from ..errors import UsageError, did_you_mean

PATTERNS = ["cla<k>", "cla<k>-keep-ends", "dense-front[:n]", "dense-back[:n]", "trailing:<n>"]

Kinds = Sequence[Hashable]


def sharing_map(sharing: str | list[int] | list[list[int]], kinds: Kinds) -> list[int]:
    """Turn a pattern name, a list of groups or a list of owners into a validated map of `len(kinds)` layers.

    Raises:
        UsageError: the pattern is unknown or impossible, or a consumer precedes its owner or is of another kind.
    """
    if isinstance(sharing, str):
        sources = _from_name(sharing.strip(), kinds)
    elif sharing and isinstance(sharing[0], list):
        sources = _from_groups(sharing, len(kinds))  # type: ignore[arg-type]
    else:
        sources = [int(source) for source in sharing]  # type: ignore[arg-type]
    validate_map(sources, kinds)
    return sources


def validate_map(sources: Sequence[int], kinds: Kinds) -> None:
    """Check that every consumer's owner comes earlier, owns its K/V and is of the same kind. Raises UsageError."""
    if len(sources) != len(kinds):
        raise UsageError(f"The sharing map has {len(sources)} entries, but the model has {len(kinds)} layers")
    for layer, source in enumerate(sources):
        if not 0 <= source < len(sources):
            raise UsageError(f"Layer {layer} cannot read layer {source}", why="There is no such layer.")
        if source > layer:
            raise UsageError(
                f"Layer {layer} cannot read layer {source}",
                why="A consumer needs its owner's K/V, so the owner must come earlier.",
                fix=f"Let layer {layer} own its K/V and layer {source} read layer {layer}.",
            )
        if sources[source] != source:
            raise UsageError(
                f"Layer {layer} cannot read layer {source}",
                why=f"Layer {source} has no K/V of its own: it reads layer {sources[source]}.",
                fix=f"Let layer {layer} read layer {sources[source]}, or layer {source} own its K/V.",
            )
        if kinds[source] != kinds[layer]:
            raise UsageError(
                f"Layer {layer} cannot read layer {source}",
                why=f"They are of different kinds: {describe(kinds[layer])} and {describe(kinds[source])}.",
                fix="Share only among layers of one kind; the named patterns do so by themselves.",
            )


def groups_of(sources: Sequence[int]) -> list[list[int]]:
    """Sharing groups in order of their owners, the owner first: `[0, 1, 1]` -> `[[0], [1, 2]]`."""
    groups: dict[int, list[int]] = {owner: [] for owner in sorted(set(sources))}
    for layer, source in enumerate(sources):
        groups[source].append(layer)
    return list(groups.values())


def activation_bytes(sources: Sequence[int], tokens: int, hidden_size: int, itemsize: int = 4) -> int:
    """What calibrated pooling keeps of its text: streams, two per layer that the widest group reaches over."""
    span = max(group[-1] - group[0] + 1 for group in groups_of(sources))
    return (2 * span + 5) * tokens * hidden_size * itemsize


def describe(kind: Hashable) -> str:
    """A kind in words: its parts joined by commas."""
    return ", ".join(map(str, kind)) if isinstance(kind, tuple) else str(kind)


def picture(sources: Sequence[int], width: int = 100) -> str:
    """The map as text, one bracket per group, the owner first: `[0] [1 ← 2] [3 ← 4] [5]`."""
    lines = [""]
    for owner, *consumers in groups_of(sources):
        group = f"[{owner}" + (f" ← {','.join(map(str, consumers))}]" if consumers else "]")
        if len(lines[-1]) + len(group) >= width:
            lines.append("")
        lines[-1] += " " * bool(lines[-1]) + group
    return "\n".join(lines)


def _from_name(name: str, kinds: Kinds) -> list[int]:
    if name.startswith("["):
        try:
            return sharing_map(json.loads(name), kinds)
        except (json.JSONDecodeError, ValueError, TypeError) as error:
            raise UsageError(f"--sharing {name!r} is not a list of groups or of owners", why=str(error)) from error
    if match := re.fullmatch(r"cla(\d+)(-keep-ends)?", name):
        return _grouped(int(match[1]), bool(match[2]), kinds)
    if match := re.fullmatch(r"(dense-front|dense-back|trailing)(?::(\d+))?", name):
        n = int(match[2]) if match[2] else None
        return {"dense-front": _dense_front, "dense-back": _dense_back, "trailing": _trailing}[match[1]](n, kinds)
    hint = did_you_mean(name, ["cla2", "cla3", "cla2-keep-ends", "dense-front", "dense-back", "trailing:4"])
    raise UsageError(
        f"Unknown sharing pattern {name!r}.{hint}",
        fix=f"Patterns: {', '.join(PATTERNS)}; or groups such as [[0],[1,2],[3]].",
    )


def _from_groups(groups: list[list[int]], layers: int) -> list[int]:
    members = sorted(layer for group in groups for layer in group)
    if members != list(range(layers)):
        raise UsageError(
            "The groups do not name every layer exactly once",
            why=f"They name {members}; the model has layers 0 to {layers - 1}.",
        )
    owner = {layer: min(group) for group in groups for layer in group}
    return [owner[layer] for layer in range(layers)]


def _layers_by_kind(layers: Sequence[int], kinds: Kinds) -> list[list[int]]:
    by_kind: dict[Hashable, list[int]] = {}
    for layer in layers:
        by_kind.setdefault(kinds[layer], []).append(layer)
    return list(by_kind.values())


def _grouped(k: int, keep_ends: bool, kinds: Kinds) -> list[int]:
    """CLA-k: groups of k consecutive layers of a kind, the first owns; a remainder is a smaller group placed first."""
    if k < 1:
        raise UsageError(f"cla{k} makes no sense", fix="Use cla2 or cla3.")
    sources = list(range(len(kinds)))
    middle = sources[1:-1] if keep_ends else sources
    for layers in _layers_by_kind(middle, kinds):
        first = len(layers) % k
        starts = ([0] if first else []) + list(range(first, len(layers), k))
        for start, end in zip(starts, [*starts[1:], len(layers)], strict=True):
            for layer in layers[start:end]:
                sources[layer] = layers[start]
    return sources


def _dense_front(n: int | None, kinds: Kinds) -> list[int]:
    """0..n-2 own; n-1..L-2 read layer n-2 (of several kinds: the last owner of their own); L-1 owns."""
    layers = len(kinds)
    n = _kv_layers("dense-front", n if n is not None else layers // 2 + 1, layers)
    return [_last_of_kind(layer, n - 1, kinds) if n - 1 <= layer < layers - 1 else layer for layer in range(layers)]


def _dense_back(n: int | None, kinds: Kinds) -> list[int]:
    """0 and 1 own; 2..L-n+1 read layer 1 (of several kinds: the first owner of their own); the last n-2 own."""
    layers = len(kinds)
    n = _kv_layers("dense-back", n if n is not None else layers // 2 + 1, layers)
    return [_last_of_kind(layer, 2, kinds) if 2 <= layer <= layers - n + 1 else layer for layer in range(layers)]


def _trailing(n: int | None, kinds: Kinds) -> list[int]:
    """The last n layers read the last owner of their own kind (as in YOCO and Gemma 3n)."""
    layers = len(kinds)
    if n is None or not 0 < n < layers:
        raise UsageError(
            "trailing needs the number of trailing consumers", fix=f"Between trailing:1 and trailing:{layers - 1}."
        )
    return [_last_of_kind(layer, layers - n, kinds) if layer >= layers - n else layer for layer in range(layers)]


def _kv_layers(pattern: str, n: int, layers: int) -> int:
    if not 3 <= n <= layers:
        raise UsageError(
            f"{pattern}:{n} is impossible", why=f"n, the number of KV layers, lies between 3 and {layers}."
        )
    return n


def _last_of_kind(layer: int, before: int, kinds: Kinds) -> int:
    """The last layer of `layer`'s kind among layers 0..before-1."""
    for candidate in range(before - 1, -1, -1):
        if kinds[candidate] == kinds[layer]:
            return candidate
    raise UsageError(
        f"Layer {layer} has no owner to read",
        why=f"None of layers 0 to {before - 1} is of its kind ({describe(kinds[layer])}).",
        fix="Choose another pattern, or give the groups by hand.",
    )
