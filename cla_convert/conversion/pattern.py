"""Named sharing patterns: a registry, and what their rules are made of. A new one is one file in `patterns/`."""

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from ..errors import UsageError, did_you_mean
from ..registry import Registry

LayerKinds = Sequence[Hashable]
"""The attention kind of every layer; only layers of one kind can share."""


@dataclass(frozen=True)
class Pattern:
    """A rule that makes a sharing map for any number of layers."""

    name: str
    """How it is spelled, its number in brackets: `cla<k>`."""
    summary: str
    spelling: str
    """Regular expression of its names, with the number as its only group."""
    owners: Callable[[int | None, LayerKinds], list[int]]
    """The number in the name (None where it is left out) and the kinds of all layers -> the owner of every layer.

    It may raise UsageError; whether the map is one is checked by `sharing_map`."""
    examples: tuple[str, ...]
    """Names that `inspect` shows, and that are suggested for a misspelled one."""


class Patterns(Registry[Pattern]):
    """Patterns are found by how a name is spelled."""

    def spelled(self, name: str) -> tuple[Pattern, int | None]:
        """The pattern of a name, and the number in it. Raises UsageError if there is no such pattern."""
        for pattern in self:
            if match := re.fullmatch(pattern.spelling, name):
                return pattern, int(match[1]) if match[1] else None
        hint = did_you_mean(name, [*self.examples(), *self.names()])
        raise UsageError(
            f"Unknown sharing pattern {name!r}.{hint}",
            fix=f"Patterns: {', '.join(self.names())}; or groups such as [[0],[1,2],[3]].",
        )

    def check(self, name: str) -> None:
        """Raise UsageError for what no pattern spells, unless it is `auto` or a list in brackets."""
        if name != "auto" and not name.strip().startswith("["):
            self.spelled(name.strip())

    def examples(self) -> list[str]:
        """Names of patterns, the usual ones of each."""
        return [name for pattern in self for name in pattern.examples]


PATTERNS = Patterns("sharing pattern", f"{__package__}.patterns")


def map_of(name: str, kinds: LayerKinds) -> list[int]:
    """The map that a pattern's name stands for. Raises UsageError if there is no such pattern, or it is impossible."""
    pattern, number = PATTERNS.spelled(name)
    return pattern.owners(number, kinds)


def layers_by_kind(layers: Sequence[int], kinds: LayerKinds) -> list[list[int]]:
    """`layers` apart by their kind, in order: "adjacent" means adjacent in one of these lists."""
    by_kind: dict[Hashable, list[int]] = {}
    for layer in layers:
        by_kind.setdefault(kinds[layer], []).append(layer)
    return list(by_kind.values())


def last_of_kind(layer: int, before: int, kinds: LayerKinds) -> int:
    """The last layer of `layer`'s kind among layers 0..before-1. Raises UsageError if there is none."""
    for candidate in range(before - 1, -1, -1):
        if kinds[candidate] == kinds[layer]:
            return candidate
    raise UsageError(
        f"Layer {layer} has no owner to read",
        why=f"None of layers 0 to {before - 1} is of its kind ({describe(kinds[layer])}).",
        fix="Choose another pattern, or give the groups by hand.",
    )


def describe(kind: Hashable) -> str:
    """A kind in words: its parts joined by commas."""
    return ", ".join(map(str, kind)) if isinstance(kind, tuple) else str(kind)
