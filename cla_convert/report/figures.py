"""Figures in one style, as PNG for Markdown and as inline SVG that takes the colours of the page around it.

matplotlib without pyplot: no global state, no window, whatever the user's backend is. Imported where a figure is drawn.
"""

import io
import logging
import re
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # without a home it tells at length where it keeps its caches

INK, MUTED, SOURCE, CLA, WARM = "#24292f", "#6e7781", "#57738c", "#0b7a75", "#c2571a"
"""Text, secondary lines, the source model, the converted model, and what needs attention."""
_VARIABLES = {INK: "--ink", MUTED: "--muted", SOURCE: "--source", CLA: "--cla", WARM: "--warm"}
"""The page's CSS variable of each colour: the same SVG is then right on a light and on a dark page."""
_STYLE: Any = {
    "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "xtick.color": MUTED,
    "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": MUTED, "grid.alpha": 0.25,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "legend.frameon": False,
    "lines.linewidth": 1.7, "lines.markersize": 5,
    # Text stays text, and names from outside are never read as formulae.
    "svg.fonttype": "none", "text.parse_math": False,
}  # fmt: skip


Drawing = TypeVar("Drawing", bound=Callable[..., Any])


def in_style(draw: Drawing) -> Drawing:
    """Decorator of a function that draws: matplotlib takes its settings when an artist is made."""

    @wraps(draw)
    def styled(*arguments: Any, **options: Any) -> Any:
        from matplotlib import rc_context

        with rc_context(_STYLE):
            return draw(*arguments, **options)

    return cast(Drawing, styled)


@in_style
def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = 5.6, height: float = 2.7, sharex: bool = False
) -> "tuple[Figure, Any]":
    """A figure of `rows` x `columns` axes (an array), each `height` inches high; legible on a phone at this width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=sharex)


@in_style
def to_png(figure: "Figure") -> bytes:
    """A PNG. No creation date and version inside: the same numbers give the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


@in_style
def to_svg(figure: "Figure", name: str, alt: str, style: str = "") -> str:
    """An `<svg>` element to be put into a page, with its colours as the page's variables.

    Args:
        figure: what was drawn.
        name: prefix of every id in it, so that several figures may stand in one page.
        alt: what a screen reader says.
        style: class of the element.
    """
    from html import escape

    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):  # the same ids every time
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace('id="', f'id="{name}-')
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.replace("<svg", f'<svg class="{style}" role="img" aria-label="{escape(alt, quote=True)}"', 1)


def thousands(axis: "Axes", *, log: bool = False) -> None:
    """Numbers as 1,234 on the y axis; on a log axis at 1, 2, 5, 10, ..."""
    if log:
        logarithmic(axis, "y")
    axis.yaxis.set_major_formatter("{x:,.0f}")


def logarithmic(axis: "Axes", which: Literal["x", "y"]) -> None:
    """A log axis with plain numbers at 1, 2, 5, 10, ..."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set(**{f"{which}scale": "log"})
    one = axis.xaxis if which == "x" else axis.yaxis
    one.set_major_locator(LogLocator(subs=(1, 2, 5)))
    one.set_minor_locator(NullLocator())
    one.set_major_formatter("{x:g}")
