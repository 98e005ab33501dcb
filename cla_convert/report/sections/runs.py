"""Several runs side by side: accuracy against KV bytes per token."""

from collections.abc import Mapping, Sequence
from functools import partial

from ..comparisons import comparison_of, mean_at
from ..content import Block, Column, Figure, Row, Table
from ..formats import count, integer, number, percent, percent_interval
from ..plots import draw_pareto
from ..run_folder import Json, RunFiles
from ..section import Material, Picture, Section, register
from ..text import Text, note

ALT = "mean accuracy against KV bytes per token"


def collect(material: Material, report: Json) -> Json:
    """runs: the source model of the first run and the last point of every run, one row each; empty for a single run.

    Rows of label, point, sharing, init, tokens, kv_bytes_per_token, accuracy, ci95, held_out and comparable. Accuracy
    is over the tasks of the first run, and None where a run was measured under another specification (comparable:
    false) or not at all. ci95 is the source's accuracy plus the interval of the paired difference from it, within 0
    to 1. held_out is None where the run's held-out text is not that of the first run.
    """
    if not material.others:
        return {"runs": []}
    runs, summary = [material.run, *material.others], material.comparison["mean_accuracy"]
    labels = _labels(runs)
    rows = [_row(material, runs[0], "source model", "before", summary)]
    return {"runs": rows + [_row(material, run, labels[i], run.last_point, summary) for i, run in enumerate(runs)]}


def _row(material: Material, run: RunFiles, label: str, point: str | None, summary: Json | None) -> Json:
    computed = (run.convert.get("kv_bytes_per_token") or {}).get("before" if point == "before" else "after")
    hashes = [one.results.get("before", {}).get("specification_hash") for one in (run, material.run)]
    comparable = None not in hashes and hashes[0] == hashes[1]
    converted = point != "before"
    texts = [one.held_out.get("before", {}).get("identity") for one in (run, material.run)]
    same_text = run is material.run or (texts[0] is not None and texts[0] == texts[1])
    return {
        "label": label,
        "point": point,
        "sharing": run.convert.get("sharing") if converted else None,
        "init": run.convert.get("init") if converted else None,
        "tokens": run.train.get("tokens") if converted else None,
        "kv_bytes_per_token": run.kv_cache.get(point or "", {}).get("bytes_per_token") or computed,
        "accuracy": mean_at(run, summary, point) if point and comparable else None,
        "ci95": _interval(material, run, summary) if converted and comparable else None,
        "held_out": run.held_out.get(point or "", {}).get("perplexity") if same_text else None,
        "comparable": comparable,
    }


def _interval(material: Material, run: RunFiles, summary: Json | None) -> list[float] | None:
    found = comparison_of(run, material.margins, material.seed)["mean_accuracy"]
    if not found or not summary or found["metrics"] != summary["metrics"]:
        return None
    return [min(1.0, max(0.0, found["before"] + end)) for end in found["ci95"]]


def _labels(runs: Sequence[RunFiles]) -> list[str]:
    """Folder names, or whole paths where names repeat."""
    names = [run.path.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def show(report: Json) -> Sequence[Block]:
    """The picture and the table."""
    if not report["runs"]:
        return []
    caption = (
        "Bars: the source's accuracy plus the 95% interval of the paired difference from it. The dotted line joins the "
        "runs that no other one beats."
    )
    columns = [
        Column("run", text=True), Column("sharing", text=True), Column("init", text=True), Column("tokens"),
        Column("KV bytes per token"), Column("accuracy, % [95% CI]", long=True), Column("held-out perplexity"),
    ]  # fmt: skip
    rows = [
        Row(
            [
                run["label"], str(run["sharing"] or ""), str(run["init"] or ""),
                count(run["tokens"]) if run["tokens"] else "", integer(run["kv_bytes_per_token"]), _accuracy(run),
                number(run["held_out"]),
            ]
        )
        for run in report["runs"]
    ]  # fmt: skip
    figure = [Figure("pareto", ALT, caption)] if "pareto" in report["plots"] else []
    return [*figure, Table(columns, rows)]


def _accuracy(run: Json) -> Text:
    if not run["comparable"]:
        return "measured differently"
    return [f"{percent(run['accuracy'])} ", note(percent_interval(run["ci95"]))]


def draw(run: RunFiles, report: Json) -> Mapping[str, Picture]:
    """Accuracy over bytes, where there are two points at least."""
    known = sum(row["accuracy"] is not None and row["kv_bytes_per_token"] is not None for row in report["runs"])
    return {"pareto": Picture(ALT, partial(draw_pareto, report["runs"]))} if known > 1 else {}


register(Section("runs", place=60, title="Against other runs", collect=collect, show=show, draw=draw))
