"""The picture of the README: which layers of SmolLM2-135M keep K/V before and after conversion, and what a token costs.

python benchmarks/draw_sharing_map.py > docs/sharing-map.svg
"""

from collections.abc import Iterator

from cla_convert.conversion.sharing import sharing_map
from cla_convert.models.kinds import FULL

LAYERS, HEADS, HEAD_DIM, BYTES = 30, 3, 64, 2
PATTERN = "cla2-keep-ends"
STEP, SIDE, LEFT = 24, 20, 12
STYLE = """
  text { font: 13px -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #24292f }
  .quiet { fill: #57606a } .number { font-size: 9px; text-anchor: middle } .on { fill: #fff }
  .source { fill: #6e7781 } .owner { fill: #0969da } .arrow { fill: none; stroke: #0969da; stroke-width: 1.5 }
  .consumer { fill: none; stroke: #0969da; stroke-width: 1.2; stroke-dasharray: 3 2 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .quiet { fill: #9198a1 } .on { fill: #fff }
    .owner { fill: #1f6feb } .arrow, .consumer { stroke: #58a6ff }
  }"""


def main() -> None:
    """Print the SVG."""
    after = sharing_map(PATTERN, [FULL] * LAYERS)
    width = LEFT * 2 + LAYERS * STEP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 214" role="img" aria-labelledby="title">',
        f'<title id="title">Before: {LAYERS} of {LAYERS} layers cache keys and values, {per_token(LAYERS):,} bytes '
        f"a token. After: {len(set(after))} of {LAYERS}, {per_token(len(set(after))):,} bytes a token</title>",
        f"<style>{STYLE}\n</style>",
        *row(20, "before: every layer computes and caches its own keys and values", list(range(LAYERS))),
        *row(116, f"after: {len(set(after))} layers do, the others read their neighbour's", after),
        "</svg>",
    ]
    print("\n".join(lines))


def row(top: int, heading: str, sources: list[int]) -> Iterator[str]:
    """A heading, a square for every layer, and a bar as long as the KV cache."""
    owners, changed = len(set(sources)), sources != list(range(LAYERS))
    yield f'<text x="{LEFT}" y="{top}">{heading}</text>'
    squares = top + (24 if changed else 12)
    for layer, owner in enumerate(sources):
        x, own = LEFT + layer * STEP, layer == owner
        colour = ("owner" if own else "consumer") if changed else "source"
        yield f'<rect class="{colour}" x="{x}" y="{squares}" width="{SIDE}" height="{SIDE}" rx="4"/>'
        ink = " on" if own else ""
        yield f'<text class="number{ink}" x="{x + SIDE / 2}" y="{squares + 13.5}">{layer}</text>'
        if not own:
            start, end, foot = x + SIDE / 2, LEFT + owner * STEP + SIDE / 2, squares - 2
            yield f'<path class="arrow" d="M{start} {foot} Q{(start + end) / 2} {foot - 12} {end} {foot}"/>'
    bar, length = squares + SIDE + 10, owners * STEP - (STEP - SIDE)
    yield f'<rect class="{"owner" if changed else "source"}" x="{LEFT}" y="{bar}" width="{length}" height="6" rx="3"/>'
    yield f'<text class="quiet" x="{LEFT}" y="{bar + 22}">KV cache: {per_token(owners):,} bytes a token</text>'


def per_token(owners: int) -> int:
    """Bytes of K and V in 16-bit numbers."""
    return 2 * owners * HEADS * HEAD_DIM * BYTES


if __name__ == "__main__":
    main()
