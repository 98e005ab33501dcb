"""Plots of several runs: quality against KV bytes, perplexity and KL over training tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .figures import CLA, INK, MUTED, SOURCE, WARM, in_style, logarithmic, new_figure, thousands
from .plots import WIDTH
from .run_folder import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Quality:
    """A measure that is drawn against KV bytes."""

    key: str
    label: str
    scale: float = 1.0
    more_is_better: bool = True
    above: str = ""
    """The label where it is taken from the source's, if another."""

    def known(self, runs: list[Json]) -> list[Json]:
        """The runs that have it."""
        return [run for run in runs if run.get(self.key) is not None and run["kv_bytes_per_token"]]


QUALITIES = (
    Quality("accuracy", "mean accuracy, %", 100, above="accuracy, points from the source"),
    Quality("kl", "KL from the source, nats", more_is_better=False),
)


@in_style
def draw_pareto(runs: list[Json], width: float = WIDTH) -> "Figure":
    """Mean accuracy and KL against KV bytes per token, one point a run.

    A line joins the runs of a source model that no other one of it beats. Where there are several source models, bytes
    and accuracy are taken from each run's own: those of another model are no measure of a conversion.

    Args:
        runs: rows with kv_bytes_per_token, accuracy or kl (None ones are left out) and perhaps ci95, drawn as a bar.
        width: in inches.
    """
    by_model, shown = _drawn(runs)
    several = len(by_model) > 1
    figure, axes = new_figure(len(shown), width=width, height=3.2, sharex=True)
    for axis, quality in zip(axes[:, 0], shown, strict=True):
        _against_bytes(axis, quality, [quality.known(made) for made in by_model])
        axis.set_ylabel((several and quality.above) or quality.label)
    axes[-1, 0].set_xlabel("KV bytes per token, % of the source's" if several else "KV bytes per token")
    axes[-1, 0].xaxis.set_major_formatter("{x:,.0f}")
    return figure


def has_pareto(runs: list[Json]) -> bool:
    """Whether there is anything to draw: two points of a quality."""
    return bool(_drawn(runs)[1])


def _drawn(runs: list[Json]) -> tuple[list[list[Json]], list[Quality]]:
    """What is drawn of the runs of each source model, and the qualities that two of all of them have."""
    by_model = by_source(runs)
    by_model = [_from_source(made) for made in by_model] if len(by_model) > 1 else by_model
    return by_model, [quality for quality in QUALITIES if sum(len(quality.known(made)) for made in by_model) > 1]


def _from_source(made: list[Json]) -> list[Json]:
    """Runs of a source model, which stands first, with bytes as a percentage of its own and accuracy above its own."""
    whole, accuracy = made[0]["kv_bytes_per_token"], made[0]["accuracy"]

    def compared(run: Json) -> Json:
        size, score, ends = run["kv_bytes_per_token"], run["accuracy"], run.get("ci95")
        share = 100 * size / whole if size and whole else None
        if accuracy is None or score is None:
            return run | {"kv_bytes_per_token": share, "accuracy": None, "ci95": None}
        bar = [end - accuracy for end in ends] if ends else None
        return run | {"kv_bytes_per_token": share, "accuracy": score - accuracy, "ci95": bar}

    return [compared(run) for run in made]


def _against_bytes(axis: "Axes", quality: Quality, by_model: list[list[Json]]) -> None:
    """The runs of each source model."""
    runs = [run for made in by_model for run in made]
    fronts = [pareto_front(made, quality) for made in by_model]
    for front in fronts:
        axis.plot(*_places(front, quality), color=MUTED, linestyle=":")
    best = [run for front in fronts for run in front]
    for run in runs:
        colour = SOURCE if run["point"] == "before" else CLA if run in best else WARM
        if quality.key == "accuracy" and run.get("ci95"):
            x, ends = run["kv_bytes_per_token"], [quality.scale * end for end in run["ci95"]]
            axis.plot([x, x], ends, color=colour, linewidth=1.2, marker="_", markersize=7)
        axis.plot(*_places([run], quality), marker="o", linestyle="none", color=colour)
    middle = sum(extreme(run["kv_bytes_per_token"] for run in runs) for extreme in (min, max)) / 2
    for (x, y), names in _labels(runs, quality).items():
        offset, side = ((7, 4), "left") if x <= middle else ((-7, 4), "right")  # or it would leave the picture
        axis.annotate(
            ", ".join(names), (x, y), xytext=offset, textcoords="offset points", ha=side, color=INK, fontsize=8.5
        )
    axis.margins(x=0.18, y=0.15)
    values = [run[quality.key] for run in runs]
    if not quality.more_is_better and min(values) > 0 and max(values) > 5 * min(values):
        logarithmic(axis, "y")


def _places(runs: list[Json], quality: Quality) -> tuple[list[float], list[float]]:
    return [run["kv_bytes_per_token"] for run in runs], [quality.scale * run[quality.key] for run in runs]


def _labels(runs: list[Json], quality: Quality) -> dict[tuple[float, float], list[str]]:
    """Names by place: those of runs that lie on one point stand side by side."""
    names: dict[tuple[float, float], list[str]] = {}
    for run in runs:
        (x,), (y,) = _places([run], quality)
        names.setdefault((x, y), []).append(run["label"])
    return names


def by_source(runs: list[Json]) -> list[list[Json]]:
    """The runs with the source model that each was made of, which stands first: other models' runs do not beat them."""
    made: list[list[Json]] = []
    for run in runs:
        if run["point"] == "before" or not made:
            made.append([])
        made[-1].append(run)
    return made


def pareto_front(runs: list[Json], quality: Quality = QUALITIES[0]) -> list[Json]:
    """Those better than every other one of as few or fewer bytes, by bytes."""
    front: list[Json] = []
    sign = 1 if quality.more_is_better else -1
    for run in sorted(runs, key=lambda run: (run["kv_bytes_per_token"], -sign * run[quality.key])):
        if not front or sign * run[quality.key] > sign * front[-1][quality.key]:
            front.append(run)
    return front


PANELS = (("validation", "held-out perplexity"), ("kl", "KL in training, nats"))
"""Curves of a row, and what they show."""


@in_style
def draw_learning(runs: list[Json], width: float = WIDTH) -> "Figure":
    """Held-out perplexity and KL on the training text over tokens, a line a run.

    Args:
        runs: rows with curves {validation, kl}, each pairs of tokens and a value.
        width: in inches.
    """
    panels = [(name, label) for name, label in PANELS if any(run["curves"][name] for run in runs)]
    most = max(tokens for run in runs for curve in run["curves"].values() for tokens, _ in curve)
    scale, unit = (1e6, "millions") if most >= 2e6 else (1e3, "thousands")
    figure, axes = new_figure(len(panels), width=width, height=2.6, sharex=True)
    for axis, (name, label) in zip(axes[:, 0], panels, strict=True):
        for number, run in enumerate(runs):
            curve = run["curves"][name]
            xs, ys = [tokens / scale for tokens, _ in curve], [value for _, value in curve]
            marker = "." if name == "validation" else None
            axis.plot(xs, ys, label=run["label"], color=f"C{number % 10}", marker=marker, linewidth=1.2)
        axis.set_ylabel(label)
        values = [value for run in runs for _, value in run["curves"][name]]
        if max(values) > 5 * min(values):
            thousands(axis, log=True) if name == "validation" else logarithmic(axis, "y")
    axes[0, 0].legend(fontsize=8.5)
    axes[-1, 0].set_xlabel(f"training tokens, {unit}")
    return figure
