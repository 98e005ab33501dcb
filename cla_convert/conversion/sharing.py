"""Sharing patterns and the sharing map (`kv_source_layers`): entry i is the layer whose K/V layer i reads.

`kinds` gives each layer's attention kind (sliding or full, RoPE or not, head shape). Only layers of one kind can share,
so "adjacent" always means adjacent among the layers of a kind.
"""

import json
from collections.abc import Sequence

from ..errors import UsageError
from .pattern import LayerKinds, describe, map_of


def sharing_map(sharing: str | list[int] | list[list[int]], kinds: LayerKinds) -> list[int]:
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


def validate_map(sources: Sequence[int], kinds: LayerKinds) -> None:
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


def matched_groups(sources: Sequence[int], *, every: bool = False) -> int:
    """How many groups calibrated pooling matches: from the first that shares on, or `every` one (of fewer heads)."""
    if every:
        return len(set(sources))
    first = next((group[0] for group in groups_of(sources) if len(group) > 1), len(sources))
    return sum(owner >= first for owner in set(sources))


def activation_bytes(sources: Sequence[int], tokens: int, hidden_size: int, itemsize: int = 4) -> int:
    """What calibrated pooling keeps of its text: streams, two per layer that the widest group reaches over."""
    span = max(group[-1] - group[0] + 1 for group in groups_of(sources))
    return (2 * span + 5) * tokens * hidden_size * itemsize


def picture(sources: Sequence[int], width: int = 68) -> str:
    """The map as text, one bracket per group, the owner first: `[0] [1 ← 2] [3 ← 4] [5]`."""
    lines = [""]
    for owner, *consumers in groups_of(sources):
        group = f"[{owner}" + (f" ← {','.join(map(str, consumers))}]" if consumers else "]")
        if len(lines[-1]) + len(group) >= width:
            lines.append("")
        lines[-1] += " " * bool(lines[-1]) + group
    return "\n".join(lines)


def _from_name(name: str, kinds: LayerKinds) -> list[int]:
    if name.startswith("["):
        try:
            return sharing_map(json.loads(name), kinds)
        except (json.JSONDecodeError, ValueError, TypeError) as error:
            raise UsageError(f"--sharing {name!r} is not a list of groups or of owners", why=str(error)) from error
    return map_of(name, kinds)


def _from_groups(groups: list[list[int]], layers: int) -> list[int]:
    members = sorted(layer for group in groups for layer in group)
    if members != list(range(layers)):
        raise UsageError(
            "The groups do not name every layer exactly once",
            why=f"They name {members}; the model has layers 0 to {layers - 1}.",
        )
    owner = {layer: min(group) for group in groups for layer in group}
    return [owner[layer] for layer in range(layers)]
