"""The numbers of a report: scores at every point, and their paired comparison."""

from typing import Any

from ..evaluation.comparison import compare_points
from .run_folder import POINTS, Json, RunFiles


def comparison_of(run: RunFiles, margin: float, seed: int) -> Json:
    """Before against the last point: eval/comparison.json if evaluation left it, else computed here."""
    point, fixed = run.last_point, run.comparison.get("margin", margin)
    if run.comparison and (run.comparison.get("compared"), fixed) == (point, margin):
        return run.comparison
    return compare_points(run.files.evaluation.path, "before", point or "converted", margin=margin, seed=seed)


def control_comparison(run: RunFiles, margin: float, seed: int) -> Json | None:
    """The control against the uptrained model, in the same shape; None without a measured control."""
    if "control" not in run.results:
        return None
    return compare_points(run.files.evaluation.path, "control", "after", margin=margin, seed=seed)


def task_table(run: RunFiles, comparison: Json, control: Json | None) -> dict[str, dict[str, Json]]:
    """{task: {metric: {before, converted, after, control, delta, ci95, p_value, n, ...}}}; not measured is None.

    With a control, `cla_cost` holds delta, ci95 and p_value of after against the control.
    """
    names = dict.fromkeys(task for point in POINTS for task in run.results.get(point, {}).get("tasks", {}))
    return {
        task: {metric: _row(run, comparison, control, task, metric) for metric in _metrics(run, task)} for task in names
    }


def _metrics(run: RunFiles, task: str) -> list[str]:
    return list(dict.fromkeys(m for p in POINTS for m in run.results.get(p, {}).get("tasks", {}).get(task, {})))


def _row(run: RunFiles, comparison: Json, control: Json | None, task: str, metric: str) -> Json:
    values = {point: run.results.get(point, {}).get("tasks", {}).get(task, {}).get(metric) for point in POINTS}
    n = next((run.results[p]["n"][task] for p in POINTS if task in run.results.get(p, {}).get("n", {})), None)
    row: Json = {**values, "delta": None, "ci95": None, "p_value": None, "n": n}
    if statistics := comparison["tasks"].get(task, {}).get(metric):
        details = dict(statistics)
        details["before_paired"], details["after_paired"] = details.pop("before"), details.pop("after")
        row |= details
    else:
        row["delta"] = _difference(values["before"], values.get(comparison["compared"] or ""))
    if control:
        row["cla_cost"] = _cost(control["tasks"].get(task, {}).get(metric, {}))
    return row


def _cost(statistics: Json) -> Json:
    return {key: statistics.get(key) for key in ("delta", "ci95", "p_value")}


def perplexity_table(
    run: RunFiles, tasks: dict[str, dict[str, Json]], comparison: Json, control: Json | None
) -> dict[str, Json]:
    """{name: {before, converted, after, control, unit, relative, cla_cost, ...}}: held-out text, text files, tasks.

    With a control, `cla_cost` holds delta, ci95 and p_value of after against the control, paired by window or document.
    """
    table: dict[str, Json] = {}
    for name in ["held_out", *dict.fromkeys(name for texts in run.texts.values() for name in texts)]:
        files = run.held_out if name == "held_out" else {p: t[name] for p, t in run.texts.items() if name in t}
        if files:
            statistics = {"ci95": None, "p_value": None} | comparison["perplexity"].get(name, {})
            table[name] = statistics | _text_row(files)
            if control:
                table[name]["cla_cost"] = _cost(control["perplexity"].get(name, {}))
    for task, metrics in tasks.items():
        for metric, unit in (("word_perplexity", "word"), ("perplexity", "answer")):
            if metric in metrics:
                table[task] = {**metrics[metric], "unit": unit}
    for row in table.values():
        last = row["after"] if row["after"] is not None else row["converted"]
        row["delta"] = _difference(row["before"], last)
        row["relative"] = None if row["delta"] is None else last / row["before"] - 1
        row["cla_cost_relative"] = row["after"] / row["control"] - 1 if row["after"] and row["control"] else None
    return table


def _text_row(files: dict[str, Json]) -> Json:
    """Perplexity of one text at every point, and its tokens."""
    tokens = next((value.get("tokens") for value in files.values() if value.get("tokens")), None)
    return {point: files.get(point, {}).get("perplexity") for point in POINTS} | {"unit": "token", "n": tokens}


def mean_at(run: RunFiles, summary: Json | None, point: str) -> float | None:
    """Mean over the summary's tasks of its metrics at another point; None unless all of them were measured there."""
    if not summary:
        return None
    metrics = summary["metrics"].items()
    values = [run.results.get(point, {}).get("tasks", {}).get(task, {}).get(metric) for task, metric in metrics]
    return None if None in values else sum(values) / len(values)


def kv_numbers(run: RunFiles) -> Json:
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
        "layer_bytes_per_token_after": after.get("layer_bytes_per_token"),
        "measured_tokens": after.get("tokens") or before.get("tokens"),
        "cached_layers_before": before.get("cached_layers"),
        "cached_layers_after": after.get("cached_layers"),
        "dtype_before": before.get("dtype"),
        "dtype_after": after.get("dtype"),
        "sliding_layers": after.get("sliding_layers"),
    }


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
