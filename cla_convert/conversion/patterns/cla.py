"""CLA-k (arXiv 2405.12981, figure 2): groups of k consecutive layers of a kind, the first one owns."""

from functools import partial

from ...errors import UsageError
from ..pattern import PATTERNS, LayerKinds, Pattern, layers_by_kind


def grouped(k: int | None, kinds: LayerKinds, *, keep_ends: bool) -> list[int]:
    """Groups of k; a remainder is a smaller group placed first."""
    if not k:
        raise UsageError(f"cla{k} makes no sense", fix="Use cla2 or cla3.")
    sources = list(range(len(kinds)))
    middle = sources[1:-1] if keep_ends else sources
    together = layers_by_kind(middle, kinds)
    longest = max((len(layers) for layers in together), default=0)
    if k > max(longest, 4):  # of tiny models cla4 is what it can be
        raise UsageError(
            f"cla{k} is more than there is to share",
            why=f"The model has {longest} layers of a kind that a group could hold.",
            fix=f"Use cla2 or cla3; cla{longest} would share one layer's keys and values with all of them.",
        )
    for layers in together:
        first = len(layers) % k
        starts = ([0] if first else []) + list(range(first, len(layers), k))
        for start, end in zip(starts, [*starts[1:], len(layers)], strict=True):
            for layer in layers[start:end]:
                sources[layer] = layers[start]
    return sources


PATTERNS.register(
    Pattern(
        "cla<k>",
        "consecutive groups of k, the first layer owns; a remainder is a smaller group, placed first.",
        r"cla(\d+)",
        partial(grouped, keep_ends=False),
        ("cla2", "cla3", "cla4"),
    )
)
PATTERNS.register(
    Pattern(
        "cla<k>-keep-ends",
        "the first and last layer share with nobody, the middle is grouped by k.",
        r"cla(\d+)-keep-ends",
        partial(grouped, keep_ends=True),
        ("cla2-keep-ends", "cla3-keep-ends"),
    )
)
