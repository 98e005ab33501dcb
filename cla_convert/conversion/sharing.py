"""Sharing patterns and the sharing map (`kv_source_layers`): entry i is the layer whose K/V layer i reads.

`kinds` gives each layer's attention kind (sliding or full, RoPE or not, head shape). Only layers of one kind can share,
so "adjacent" always means adjacent among the layers of a kind. A layer without attention (of a hybrid) reads none, and
patterns do not see it.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial

from ..errors import UsageError
from ..models.kinds import has_kv
from ..models.shape import owners_of
from .pattern import LayerKinds, describe, map_of

Sharing = str | Sequence[int | None] | Sequence[Sequence[int]]
"""A pattern's name, a list of owners, or groups."""


def sharing_map(sharing: Sharing, kinds: LayerKinds) -> list[int | None]:
    """Turn a pattern name, a list of groups or a list of owners into a validated map of `len(kinds)` layers.

    Raises:
        UsageError: the pattern is unknown or impossible, or a consumer precedes its owner or is of another kind.
    """
    if isinstance(sharing, str):
        sources = _from_name(sharing.strip(), kinds)
    elif sharing and isinstance(sharing[0], list):
        sources = _from_groups(sharing, kinds)  # type: ignore[arg-type]
    else:
        sources = [source if source is None else int(source) for source in sharing]  # type: ignore[arg-type]
    validate_map(sources, kinds)
    return sources


def validate_map(sources: Sequence[int | None], kinds: LayerKinds) -> None:
    """Check that every consumer's owner comes earlier, owns its K/V and is of the same kind. Raises UsageError."""
    if len(sources) != len(kinds):
        raise UsageError(f"The sharing map has {len(sources)} entries, but the model has {len(kinds)} layers")
    for layer, source in enumerate(sources):
        if (source is None) == has_kv(kinds[layer]):
            raise UsageError(
                f"Layer {layer} reads {'no layer' if source is None else f'layer {source}'}",
                why=f"It is a layer of the kind {kinds[layer]}.",
                fix="A list of owners has null for layers without attention, and for no others; groups leave them out.",
            )
        if source is None:
            continue
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


def groups_of(sources: Sequence[int | None]) -> list[list[int]]:
    """Sharing groups in order of their owners, the owner first: `[0, 1, 1]` -> `[[0], [1, 2]]`."""
    groups: dict[int, list[int]] = {owner: [] for owner in owners_of(sources)}
    for layer, source in enumerate(sources):
        if source is not None:
            groups[source].append(layer)
    return list(groups.values())


def matched_groups(sources: Sequence[int | None], *, every: bool = False) -> int:
    """How many groups calibrated pooling matches: from the first that shares on, or `every` one (of fewer heads)."""
    if every:
        return len(owners_of(sources))
    first = next((group[0] for group in groups_of(sources) if len(group) > 1), len(sources))
    return sum(owner >= first for owner in owners_of(sources))


def activation_bytes(sources: Sequence[int | None], tokens: int, hidden_size: int, itemsize: int = 4) -> int:
    """What calibrated pooling keeps of its text: streams, two per layer that the widest group reaches over."""
    span = max(group[-1] - group[0] + 1 for group in groups_of(sources))
    return (2 * span + 5) * tokens * hidden_size * itemsize


def picture(sources: Sequence[int | None], width: int = 68) -> str:
    """The map as text, one bracket per group, the owner first: `[0] [1 ← 2] [3 ← 4] [5]`."""
    lines = [""]
    for owner, *consumers in groups_of(sources):
        group = f"[{owner}" + (f" ← {','.join(map(str, consumers))}]" if consumers else "]")
        if len(lines[-1]) + len(group) >= width:
            lines.append("")
        lines[-1] += " " * bool(lines[-1]) + group
    return "\n".join(lines)


def _from_name(name: str, kinds: LayerKinds) -> list[int | None]:
    if name.startswith("["):
        try:
            return sharing_map(json.loads(name), kinds)
        except (json.JSONDecodeError, ValueError, TypeError) as error:
            raise UsageError(f"--sharing {name!r} is not a list of groups or of owners", why=str(error)) from error
    return _among(_with_kv(kinds), kinds, partial(map_of, name))


def _among(layers: Sequence[int], kinds: LayerKinds, rule: Callable[[LayerKinds], list[int]]) -> list[int | None]:
    """The map that a rule makes of `layers` alone; the others read none."""
    sources: list[int | None] = [None] * len(kinds)
    for layer, owner in zip(layers, rule([kinds[layer] for layer in layers]), strict=True):
        sources[layer] = layers[owner]
    return sources


def _from_groups(groups: list[list[int]], kinds: LayerKinds) -> list[int | None]:
    members, layers = sorted(layer for group in groups for layer in group), _with_kv(kinds)
    if members != layers:
        has = f"layers 0 to {len(kinds) - 1}" if len(layers) == len(kinds) else f"attention in layers {layers}"
        raise UsageError(
            "The groups do not name every layer exactly once", why=f"They name {members}; the model has {has}."
        )
    owner = {layer: min(group) for group in groups for layer in group}
    return [owner.get(layer) for layer in range(len(kinds))]


def _with_kv(kinds: LayerKinds) -> list[int]:
    return [layer for layer, kind in enumerate(kinds) if has_kv(kind)]
