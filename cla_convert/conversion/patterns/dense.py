"""Dense at one end (arXiv 2405.12981, figure 8): most layers own, one long group reads a single owner."""

from ...errors import UsageError
from ..pattern import PATTERNS, LayerKinds, Pattern, last_of_kind


def dense_front(n: int | None, kinds: LayerKinds) -> list[int]:
    """0..n-2 own; n-1..L-2 read layer n-2 (of several kinds: the last owner of their own); L-1 owns."""
    layers = len(kinds)
    n = _kv_layers("dense-front", n, layers)
    return [last_of_kind(layer, n - 1, kinds) if n - 1 <= layer < layers - 1 else layer for layer in range(layers)]


def dense_back(n: int | None, kinds: LayerKinds) -> list[int]:
    """0 and 1 own; 2..L-n+1 read layer 1 (of several kinds: the first owner of their own); the last n-2 own."""
    layers = len(kinds)
    n = _kv_layers("dense-back", n, layers)
    return [last_of_kind(layer, 2, kinds) if 2 <= layer <= layers - n + 1 else layer for layer in range(layers)]


def _kv_layers(pattern: str, n: int | None, layers: int) -> int:
    n = layers // 2 + 1 if n is None else n
    if not 3 <= n <= layers:
        raise UsageError(
            f"{pattern}:{n} is impossible", why=f"n, the number of KV layers, lies between 3 and {layers}."
        )
    return n


PATTERNS.register(
    Pattern(
        "dense-front[:n]",
        "n KV layers (L//2+1); 0..n-2 own, n-1..L-2 read layer n-2, L-1 owns.",
        r"dense-front(?::(\d+))?",
        dense_front,
        ("dense-front",),
    )
)
PATTERNS.register(
    Pattern(
        "dense-back[:n]",
        "n KV layers (L//2+1); 0 and 1 own, 2..L-n+1 read layer 1, the last n-2 own.",
        r"dense-back(?::(\d+))?",
        dense_back,
        ("dense-back",),
    )
)
