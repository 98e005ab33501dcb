"""The last layers read the last owner of their own kind, as in YOCO (arXiv 2405.05254) and Gemma 3n."""

from ...errors import UsageError
from ..pattern import PATTERNS, LayerKinds, Pattern, last_of_kind


def trailing(n: int | None, kinds: LayerKinds) -> list[int]:
    """The last n layers read the last owner of their own kind."""
    layers = len(kinds)
    if n is None or not 0 < n < layers:
        raise UsageError(
            "trailing needs the number of trailing consumers", fix=f"Between trailing:1 and trailing:{layers - 1}."
        )
    return [last_of_kind(layer, layers - n, kinds) if layer >= layers - n else layer for layer in range(layers)]


PATTERNS.register(
    Pattern(
        "trailing:<n>",
        "the last n layers read the last owner before them (YOCO, Gemma 3n).",
        r"trailing(?::(\d+))?",
        trailing,
        (),
    )
)
