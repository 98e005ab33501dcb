"""The paired comparisons of a run: what evaluation left, or else computed from its files."""

from ..evaluation.comparison import compare_points, compare_run, measured
from ..evaluation.verdict import Margins
from .run_folder import Json, RunFiles


def comparison_of(run: RunFiles, margins: Margins, seed: int) -> Json:
    """Before against the last point: eval/comparison.json if it is of what there is now, the model and these margins.

    Otherwise it is computed anew: an evaluation that was interrupted leaves new results beside the old comparison.
    """
    point, left = run.last_point, run.comparison
    lacking = point not in run.results or not run.incomplete.keys().isdisjoint(("before", point))
    stale = lacking or point in run.stale or _is_past(left, measured(run.files, "before", point))
    if left and (left.get("compared"), left.get("margins")) == (point, margins.as_dict()) and not stale:
        return left
    return compare_run(run.files, margins=margins, seed=seed)


def _is_past(comparison: Json, now: Json) -> bool:
    """Whether something was measured since; where results were cleared away, what was made of them stays."""
    then = comparison.get("measured")
    return then is not None and any(then.get(file) != identity for file, identity in now.items())


def control_comparison(run: RunFiles, margins: Margins, seed: int) -> Json | None:
    """The control against the uptrained model, in the same shape; None without a measured control."""
    if "control" not in run.results:
        return None
    return compare_points(run.files, "control", "after", margins=margins, seed=seed)


def mean_at(run: RunFiles, summary: Json | None, point: str) -> float | None:
    """Mean over the summary's tasks of its metrics at another point; None unless all of them were measured there."""
    if not summary:
        return None
    metrics = summary["metrics"].items()
    values = [run.results.get(point, {}).get("tasks", {}).get(task, {}).get(metric) for task, metric in metrics]
    return None if None in values else sum(values) / len(values)


def difference(before: float | None, after: float | None) -> float | None:
    """after - before, if both were measured."""
    return None if before is None or after is None else after - before


def cost(statistics: Json) -> Json:
    """delta, ci95 and p_value of after against the control; relative_ci95 where the statistics have one."""
    keys = ("delta", "ci95", "p_value", *(["relative_ci95"] if "relative_ci95" in statistics else []))
    return {key: statistics.get(key) for key in keys}
