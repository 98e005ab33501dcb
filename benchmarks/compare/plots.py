"""Pictures that a single report has not: recovery by domain of several runs, sensitivity of pairs of layers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cla_convert.report.figures import CLA, INK, MUTED, in_style, logarithmic, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Json = dict[str, Any]


@in_style
def draw_domains(runs: Mapping[str, Mapping[str, Json]]) -> "Figure":
    """KL by domain: a hollow dot for the converted model, a full one for the trained, a colour a run.

    Args:
        runs: tables of domains (report/sections/domains.py) by the name of the run.
    """
    names = list(next(iter(runs.values())))
    figure, axes = new_figure(width=7.0, height=1.2 + 0.12 * len(names) * (len(runs) + 2))
    axis = axes[0, 0]
    for number, (run, table) in enumerate(runs.items()):
        colour, shift = f"C{number % 10}", (number - (len(runs) - 1) / 2) * 0.7 / len(runs)
        axis.plot([], [], marker="o", markersize=4, color=colour, label=run)
        for place, domain in enumerate(names):
            ends = [table.get(domain, {}).get("kl", {}).get(point) for point in ("converted", "after")]
            if None in ends:
                continue
            y = place + shift
            axis.plot(ends, [y, y], color=colour, linewidth=0.8, alpha=0.5)
            axis.plot(ends[:1], [y], marker="o", markersize=4, color=colour, fillstyle="none")
            axis.plot(ends[1:], [y], marker="o", markersize=4, color=colour)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    logarithmic(axis, "x")
    axis.set_xlabel("KL from the source, nats; hollow: converted, full: trained")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure


@in_style
def draw_sensitivity(pairs: Sequence[Json]) -> "Figure":
    """What sharing each pair of neighbours alone costs.

    Args:
        pairs: rows of layers and kl, as plan.json has them of `sharing: auto`.
    """
    ordered = sorted(pairs, key=lambda pair: pair["layers"])
    figure, axes = new_figure(width=7.0, height=2.8)
    axis, places = axes[0, 0], range(len(ordered))
    axis.bar(places, [pair["kl"] for pair in ordered], color=CLA)
    axis.set_xticks(places, ["-".join(map(str, pair["layers"])) for pair in ordered], rotation=90, color=INK)
    axis.tick_params(axis="x", labelsize=7.5)
    logarithmic(axis, "y")
    axis.set_ylabel("KL, nats")
    axis.set_xlabel("layers that share", color=MUTED)
    return figure
