"""Pictures of a report: loss and validation perplexity over tokens, and the sharing map as a strip of layers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .run_folder import Json, RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OWNERS = ("#1f77b4", "#d95f02", "#2ca02c", "#7b4fa3")
_GREY = "#5f6b76"
_SMOOTHING = 0.05
"""Window of the moving average, as a share of the logged steps."""


def draw_plots(run: RunFolder) -> dict[str, str]:
    """Draw what the run folder has numbers for; return {name: file in the run folder}."""
    drawn = {}
    if len([row for row in run.metrics if row.get("loss") is not None]) > 1:
        drawn["loss"] = draw_curves(run.metrics, run.path / "loss.png", _source_line(run)).name
    sources = run.convert.get("kv_source_layers")
    if sources:
        drawn["sharing"] = draw_sharing(sources, run.path / "sharing.png").name
    return drawn


def _source_line(run: RunFolder) -> float | None:
    """The source model's perplexity on the held-out text: the level to recover, if it was measured."""
    return run.held_out.get("before", {}).get("perplexity")


def draw_curves(metrics: list[Json], path: Path, source_perplexity: float | None = None) -> Path:
    """Training loss above, validation perplexity below, over training tokens."""
    scale, unit = (1e6, "millions") if max(row["tokens"] for row in metrics) >= 2e6 else (1e3, "thousands")
    losses, checks = (_points(metrics, name, scale) for name in ("loss", "validation_perplexity"))
    figure, axes = _figure(2 if checks else 1, height=3.0)
    _curve(axes[0], losses)
    axes[0].set_ylabel("training loss, nats per token")
    if checks:
        _checks(axes[1], checks, source_perplexity)
    axes[-1].set_xlabel(f"training tokens, {unit}")
    return _save(figure, path)


def _points(metrics: list[Json], name: str, scale: float) -> list[tuple[float, float]]:
    return [(row["tokens"] / scale, row[name]) for row in metrics if row.get(name) is not None]


def _checks(axis: "Axes", points: list[tuple[float, float]], source: float | None) -> None:
    """Validation perplexity, and the source model's as the level to recover."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.plot(*zip(*points, strict=True), marker="o", color=_OWNERS[1], label="during uptraining")
    if source:
        axis.axhline(source, color=_GREY, linestyle="--", label="source model, held-out text")
        axis.legend(frameon=False)
    axis.set_ylabel("validation perplexity")
    if max(y for _, y in points) > 5 * min(y for _, y in points):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _curve(axis: "Axes", points: list[tuple[float, float]]) -> None:
    """Every logged step faintly, and a moving average of them where there are enough."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    window = round(len(ys) * _SMOOTHING)
    if window < 2:
        axis.plot(xs, ys, color=_OWNERS[0], marker="." if len(ys) < 40 else None)
        return
    means = [sum(ys[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(ys))]
    axis.plot(xs, ys, color=_OWNERS[0], alpha=0.25, linewidth=0.8)
    axis.plot(xs, means, color=_OWNERS[0], label=f"mean of {window} steps")
    axis.legend(frameon=False)


def draw_sharing(sources: list[int], path: Path) -> Path:
    """One square a layer: solid layers cache K/V, pale ones read those of the layer named in them."""
    from matplotlib.patches import FancyBboxPatch

    count, owners = len(sources), sorted(set(sources))
    reach = max(layer - owner for layer, owner in enumerate(sources))
    figure, (axis,) = _figure(1, height=1.15, width=max(5.0, 0.36 * count + 0.6))
    for layer, owner in enumerate(sources):
        colour, owns = _OWNERS[owners.index(owner) % len(_OWNERS)], owner == layer
        style: dict[str, Any] = {"facecolor": colour, "edgecolor": colour, "alpha": 1.0 if owns else 0.25}
        axis.add_patch(FancyBboxPatch((layer - 0.36, -0.36), 0.72, 0.72, boxstyle="round,pad=0.04", **style))
        axis.text(layer, 0, str(layer), ha="center", va="center", fontsize=8, color="white" if owns else "black")
        if not owns and reach <= 3:
            arrow = {"arrowstyle": "->", "color": colour, "connectionstyle": "arc3,rad=0.45"}
            axis.annotate("", (owner, 0.44), (layer, 0.44), arrowprops=arrow)
        elif not owns:  # arcs over many layers would cover each other
            axis.text(layer, 0.62, f"\u2190{owner}", ha="center", va="center", fontsize=7, color=colour)
    axis.set(xlim=(-0.6, count - 0.4), ylim=(-0.5, 1.1))
    axis.set_aspect("equal")
    axis.set_axis_off()
    axis.set_title(f"{len(owners)} of {count} layers cache K/V; a pale layer reads where its arrow points", fontsize=9)
    return _save(figure, path)


def _figure(rows: int, *, height: float, width: float = 7.0) -> tuple[Any, list["Axes"]]:
    """A figure without pyplot: no global state, no window, whatever the user's backend is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=rows > 1, squeeze=False)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, list(axes)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    # No creation date and version inside: the same numbers give the same file.
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path
