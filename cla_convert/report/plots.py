"""Plots of one run: loss and perplexity over tokens, tokens per second over batch size."""

from typing import TYPE_CHECKING, Any

from .figures import CLA, MUTED, SOURCE, in_style, new_figure, thousands
from .run_folder import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.6
"""Inches, unless a phone needs it narrower."""
_SMOOTHING = 0.05
"""Window of the moving average, as a share of the logged steps."""


@in_style
def draw_curves(
    metrics: list[Json], control: list[Json], source_perplexity: float | None = None, width: float = WIDTH
) -> "Figure":
    """Training loss above, validation perplexity below, over training tokens.

    Args:
        metrics: rows of metrics.jsonl.
        control: the same of the control's training; may be empty.
        source_perplexity: the source model's on the held-out text, the level to recover.
        width: in inches.
    """
    scale, unit = (1e6, "millions") if max(row["tokens"] for row in metrics) >= 2e6 else (1e3, "thousands")
    runs = {"converted model": (CLA, metrics), "control: source model": (SOURCE, control)}
    checks = any(row.get("validation_perplexity") is not None for row in metrics)
    figure, axes = new_figure(2 if checks else 1, width=width, height=2.2, sharex=True)
    for label, (colour, rows) in runs.items():
        _losses(axes[0, 0], _points(rows, "loss", scale), colour, label)
        if checks:
            _checks(axes[1, 0], _points(rows, "validation_perplexity", scale), colour)
    axes[0, 0].set_ylabel("training loss, nats")
    if control:
        axes[0, 0].legend()
    if checks:
        _source_level(axes[1, 0], source_perplexity)
    axes[-1, 0].set_xlabel(f"training tokens, {unit}")
    return figure


def _points(metrics: list[Json], name: str, scale: float) -> list[tuple[float, float]]:
    return [(row["tokens"] / scale, row[name]) for row in metrics if row.get(name) is not None]


def _losses(axis: "Axes", points: list[tuple[float, float]], colour: str, label: str) -> None:
    """Every logged step faintly, and a moving average of them where there are enough."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    window = round(len(ys) * _SMOOTHING)
    if window < 2:
        axis.plot(xs, ys, color=colour, marker="." if len(ys) < 40 else None, label=label)
        return
    means = [sum(ys[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(ys))]
    axis.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.8)
    axis.plot(xs, means, color=colour, label=label)


def _checks(axis: "Axes", points: list[tuple[float, float]], colour: str) -> None:
    axis.plot([x for x, _ in points], [y for _, y in points], marker="o", color=colour)
    axis.set_ylabel("held-out perplexity")


def _source_level(axis: "Axes", source: float | None) -> None:
    """The source model's perplexity as a line, and a log axis where the values span a lot."""
    if source:
        axis.axhline(source, color=MUTED, linestyle="--", linewidth=1.2, label="source model")
        axis.legend()
    axis.margins(y=0.15)  # or the line would lie on the edge
    values = [float(y) for line in axis.lines for y in line.get_ydata()]  # type: ignore[union-attr]
    if max(values) > 5 * min(values):
        thousands(axis, log=True)


@in_style
def draw_bench(bench: Json, width: float = WIDTH) -> "Figure":
    """Decoding and prefill rates over batch size, median and range; each model ends at its largest batch."""
    figure, axes = new_figure(2, width=width, height=2.4)
    for axis, phase in zip(axes[:, 0], ("decode", "prefill"), strict=True):
        _rates(axis, bench["speed"], phase)
    gigabytes = bench["memory"]["bytes"] / 1e9
    axes[0, 0].set_title(f"largest batches: what fits into {gigabytes:.3g} GB", fontsize=9, loc="left")
    axes[0, 0].legend(loc="upper left")
    axes[1, 0].set_xlabel("batch size")
    return figure


def _rates(axis: "Axes", speed: list[Json], phase: str) -> None:
    from matplotlib.ticker import NullLocator, ScalarFormatter

    batches: set[int] = set()
    for model, colour, label in (("source", SOURCE, "source model"), ("converted", CLA, "converted model")):
        rows = sorted(
            (row for row in speed if (row["model"], row["phase"]) == (model, phase) and row["fits"]),
            key=lambda row: row["batch"],
        )
        batches |= {row["batch"] for row in rows}
        middle = [row["tokens_per_second"] for row in rows]
        spread: Any = [[row["tokens_per_second"] - row["low"] for row in rows],
                       [row["high"] - row["tokens_per_second"] for row in rows]]  # fmt: skip
        axis.errorbar([row["batch"] for row in rows], middle, spread, color=colour, marker="o", capsize=2, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(_apart(batches))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.set_ylim(bottom=0)
    axis.set_ylabel(f"{phase}, tokens/s")
    thousands(axis)


def _apart(batches: set[int]) -> list[int]:
    """Batch sizes whose labels do not run into each other on a log axis; the largest always has one."""
    kept: list[int] = []
    for batch in sorted(batches, reverse=True):
        if not kept or kept[-1] >= 1.3 * batch:
            kept.append(batch)
    return kept
