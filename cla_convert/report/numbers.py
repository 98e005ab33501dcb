"""The numbers of a report: scores at the three points, and their paired comparison."""

from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..evaluation.stats import Comparison, compare, macro_average
from .run_folder import POINTS, Json, RunFolder


@dataclass(frozen=True)
class Comparisons:
    """Paired comparisons of `before` with `point`, by (task, metric), and why some could not be made."""

    point: str | None
    by_metric: dict[tuple[str, str], Comparison]
    problems: list[str]


def compare_points(run: RunFolder, margin: float, seed: int) -> Comparisons:
    """Compare `before` with the last point, task by task, from the per-document files."""
    point, found, problems = run.last_point, {}, []
    for task in run.results.get("before", {}).get("tasks", {}) if point else ():
        before, after = run.task_file("before", task), run.task_file(point or "", task)
        if before is None or after is None:
            problems.append(f"{task}: no per-document results for both points, so no interval.")
            continue
        try:
            found |= {(c.task, c.metric): c for c in compare(before, after, margin=margin, seed=seed)}
        except InputError as error:
            problems.append(str(error).replace("\n", " "))
    return Comparisons(point, found, problems)


def task_table(run: RunFolder, comparisons: Comparisons) -> dict[str, dict[str, Json]]:
    """{task: {metric: {before, converted, after, delta, ci95, p_value, n, ...}}}; what was not measured is None."""
    names = dict.fromkeys(task for point in POINTS for task in run.results.get(point, {}).get("tasks", {}))
    return {task: {metric: _row(run, comparisons, task, metric) for metric in _metrics(run, task)} for task in names}


def _metrics(run: RunFolder, task: str) -> list[str]:
    return list(dict.fromkeys(m for p in POINTS for m in run.results.get(p, {}).get("tasks", {}).get(task, {})))


def _row(run: RunFolder, comparisons: Comparisons, task: str, metric: str) -> Json:
    values = {point: run.results.get(point, {}).get("tasks", {}).get(task, {}).get(metric) for point in POINTS}
    n = next((run.results[p]["n"][task] for p in POINTS if task in run.results.get(p, {}).get("n", {})), None)
    row: Json = {**values, "delta": None, "ci95": None, "p_value": None, "n": n}
    comparison = comparisons.by_metric.get((task, metric))
    if comparison is not None:
        details = comparison.as_dict()
        details["before_paired"], details["after_paired"] = details.pop("before"), details.pop("after")
        row |= details
    elif comparisons.point and values["before"] is not None and values[comparisons.point] is not None:
        row["delta"] = values[comparisons.point] - values["before"]
    return row


def perplexity_table(run: RunFolder, tasks: dict[str, dict[str, Json]]) -> dict[str, Json]:
    """{name: {before, converted, after, unit, relative, ...}}: the held-out text, and tasks with a word perplexity."""
    table: dict[str, Json] = {}
    if run.held_out:
        values = {point: run.held_out.get(point, {}).get("perplexity") for point in POINTS}
        tokens = next((value.get("tokens") for value in run.held_out.values() if value.get("tokens")), None)
        table["held_out"] = {**values, "unit": "token", "n": tokens, "ci95": None, "p_value": None}
    for task, metrics in tasks.items():
        if "word_perplexity" in metrics:
            table[task] = {**metrics["word_perplexity"], "unit": "word"}
    for row in table.values():
        before, last = row["before"], row["after"] if row["after"] is not None else row["converted"]
        if before is None or last is None:
            row |= {"delta": None, "relative": None}
        else:
            row |= {"delta": last - before, "relative": last / before - 1}
    return table


def primary(comparisons: Comparisons) -> list[Comparison]:
    """One 0/1 metric a task: acc_norm (log-likelihood per character) if it has it, else acc, else the first."""
    chosen: dict[str, Comparison] = {}
    rank = {"acc_norm": 0, "acc": 1}
    for comparison in comparisons.by_metric.values():
        current = chosen.get(comparison.task)
        better = current is None or rank.get(comparison.metric, 2) < rank.get(current.metric, 2)
        if comparison.kind == "binary" and better:
            chosen[comparison.task] = comparison
    return list(chosen.values())


def summarise(comparisons: Comparisons, margin: float, seed: int) -> Json | None:
    """Mean accuracy over tasks, before and after, with interval and verdict; None without comparable tasks."""
    summary = macro_average(primary(comparisons), margin=margin, seed=seed)
    if summary is not None:
        summary["metrics"] = {comparison.task: comparison.metric for comparison in primary(comparisons)}
    return summary


def kv_numbers(run: RunFolder) -> Json:
    """KV bytes per token, computed by the conversion and measured in a real generation."""
    computed: Any = run.convert.get("kv_bytes_per_token") or {}
    before = run.kv_cache.get("before", {})
    after = run.kv_cache.get("after") or run.kv_cache.get("converted") or {}
    return {
        "bytes_per_token_before": computed.get("before"),
        "bytes_per_token_after": computed.get("after"),
        "measured_bytes_before": before.get("measured_bytes"),
        "measured_bytes_after": after.get("measured_bytes"),
        "measured_bytes_per_token_before": before.get("bytes_per_token"),
        "measured_bytes_per_token_after": after.get("bytes_per_token"),
        "measured_tokens": after.get("tokens") or before.get("tokens"),
        "cached_layers_before": before.get("cached_layers"),
        "cached_layers_after": after.get("cached_layers"),
        "dtype_before": before.get("dtype"),
        "dtype_after": after.get("dtype"),
        "sliding_layers": after.get("sliding_layers"),
    }
