"""Accuracies at every point, and before against after on the same documents."""

from collections.abc import Sequence

from ..comparisons import cost, difference, mean_at
from ..content import Block, Column, Heading, Paragraph, Row, Table
from ..formats import cla_cost, integer, number, p_value, percent, plural, points, points_interval, signed, unit_of
from ..run_folder import POINTS, Json, RunFiles
from ..section import Material, Section, register
from ..text import note

UNITS = {"nats": "nats", "bits": "bits", "number": ""}
"""What metrics are in that are no shares and no perplexities."""


def collect(material: Material, report: Json) -> Json:
    """tasks {task: {metric: {before, converted, after, control, unit, delta, ci95, p_value, n, ...}}}, mean_accuracy.

    in_turns: true where a chat template put the questions into turns. With a control, `cla_cost` holds delta, ci95 and
    p_value of after against the control.
    """
    run, summary = material.run, material.comparison["mean_accuracy"]
    names = dict.fromkeys(task for point in POINTS for task in run.results.get(point, {}).get("tasks", {}))
    tasks = {task: {metric: _row(material, task, metric) for metric in _metrics(run, task)} for task in names}
    mean = None
    if summary:
        mean = summary | {"at": {name: mean_at(run, summary, name) for name in POINTS}}
        mean |= {"cla_cost": cost(material.control["mean_accuracy"] or {})} if material.control else {}
    # Where the model that is compared was measured, also when nothing was compared.
    return {"tasks": tasks, "mean_accuracy": mean, "compared_point": run.last_point}


def _metrics(run: RunFiles, task: str) -> list[str]:
    return list(dict.fromkeys(m for p in POINTS for m in run.results.get(p, {}).get("tasks", {}).get(task, {})))


def _row(material: Material, task: str, metric: str) -> Json:
    run, comparison, control = material.run, material.comparison, material.control
    values = {point: run.results.get(point, {}).get("tasks", {}).get(task, {}).get(metric) for point in POINTS}
    n = next((run.results[p]["n"][task] for p in POINTS if task in run.results.get(p, {}).get("n", {})), None)
    row: Json = {**values, "delta": None, "ci95": None, "p_value": None, "n": n}
    if statistics := comparison["tasks"].get(task, {}).get(metric):
        details = dict(statistics)
        details["before_paired"], details["after_paired"] = details.pop("before"), details.pop("after")
        row |= details
    else:
        row["delta"] = difference(values["before"], values.get(comparison["compared"] or ""))
    row["unit"] = unit_of(metric, row.get("kind"))
    if any("chat_template" in one["specification"]["tasks"].get(task, {}) for one in _specified(run)):
        row["in_turns"] = True
    if control:
        row["cla_cost"] = cost(control["tasks"].get(task, {}).get(metric, {}))
    return row


def _specified(run: RunFiles) -> list[Json]:
    return [result for result in run.results.values() if "tasks" in result.get("specification", {})]


def show(report: Json) -> Sequence[Block]:
    """Shares in per cent; then what is in another unit."""
    rows = [(task, metric, row) for task, metrics in report["tasks"].items() for metric, row in metrics.items()]
    shares = [one for one in rows if one[2]["unit"] == "share"]
    others = [one for one in rows if one[2]["unit"] in UNITS and one[1] != "bits_per_byte"]
    blocks: list[Block] = []
    if shares:
        blocks += [_accuracies(report, shares), Paragraph(_note(report), "note")]
    if others:
        blocks += [Heading("Other metrics"), _others(report, others)]
    return blocks


def _accuracies(report: Json, rows: list[tuple[str, str, Json]]) -> Table:
    at, control, mean = report["points"], "control" in report["points"], report["mean_accuracy"]
    columns = [Column("task", text=True), Column("metric", text=True, quiet=True), Column("n", quiet=True)]
    columns += [Column(f"{point}, %") for point in at]
    columns += [Column("delta, points [95% CI]", long=True), Column("p")]
    columns += [Column("CLA cost, points [95% CI]", long=True)] if control else []
    lines = [
        Row(
            [
                task, metric, integer(row["n"]), *(percent(row[point]) for point in at),
                [f"{points(row['delta'])} ", note(points_interval(row["ci95"]))],
                p_value(row["p_value"] if row.get("p_holm") is None else row["p_holm"]),
                *([cla_cost(row["cla_cost"])] if control else []),
            ],
            "" if row.get("primary", True) else "minor",
        )
        for task, metric, row in rows
    ]  # fmt: skip
    if mean:
        cells = [f"mean over {plural(len(mean['tasks']), 'task')}", "acc_norm or acc", integer(mean["n"])]
        cells += [percent(mean["at"][point]) for point in at]
        change = [f"{points(mean['delta'])} ", note(points_interval(mean["ci95"]))]
        lines.append(Row([*cells, change, "", *([cla_cost(mean.get("cla_cost"))] if control else [])], "sum"))
    return Table(columns, lines, "cards wide")


def _others(report: Json, rows: list[tuple[str, str, Json]]) -> Table:
    at = report["points"]
    columns = [
        Column("task", text=True),
        Column("metric", text=True),
        Column("unit", text=True),
        Column("n", quiet=True),
    ]
    columns += [Column(point) for point in at]
    columns += [Column("delta [95% CI]", long=True), Column("p")]
    lines = [
        Row(
            [
                task, metric, UNITS[row["unit"]], integer(row["n"]), *(number(row[point]) for point in at),
                [f"{signed(row['delta'])} ", note(_interval(row))], p_value(row["p_value"]),
            ]
        )
        for task, metric, row in rows
    ]  # fmt: skip
    return Table(columns, lines, "cards wide")


def _interval(row: Json) -> str:
    return "" if row["ci95"] is None else f"[{signed(row['ci95'][0])}, {signed(row['ci95'][1])}]"


def _note(report: Json) -> str:
    """What the columns of the table mean."""
    trained = report["control"] and report["control"]["kind"] == "trained"
    control = (
        " Control: the source model uptrained on the same tokens; CLA cost is after minus control." if trained else ""
    )
    corrected = any("p_holm" in row for metrics in report["tasks"].values() for row in metrics.values())
    holm = ", for a task's main metric corrected over the tasks (Holm)" if corrected else ""
    in_turns = any("in_turns" in row for metrics in report["tasks"].values() for row in metrics.values())
    asked = ", asked in turns by the model's chat template" if in_turns else ""
    return (
        f"Per cent correct on the same documents{asked}. Before: the source model. Converted: nothing trained yet. "
        f"After: uptrained.{control} The delta is {report['compared'] or 'the last point'} minus before, paired by "
        f"document; p: exact McNemar test{holm}."
    )


register(Section("accuracy", place=20, title="Accuracy", collect=collect, show=show))
