"""A sharing pattern: n pairs at the end, all other layers own."""

from cla_convert.conversion.pattern import PATTERNS, LayerKinds, Pattern


def pairs(n: int | None, kinds: LayerKinds) -> list[int]:
    layers = len(kinds)
    first = layers - 2 * (n or 1)
    return [layer - (layer >= first and (layer - first) % 2) for layer in range(layers)]


PATTERNS.register(Pattern("pairs[:n]", "n pairs at the end.", r"pairs(?::(\d+))?", pairs, ("pairs:2",)))
