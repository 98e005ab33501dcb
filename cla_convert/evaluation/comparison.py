"""Before against after of a whole run: every task and text, the mean over tasks, the verdict and the gate's findings.

`compare_run` reads the result files of a run folder and needs neither torch nor a model. What it returns is written as
eval/comparison.json:

    compared        after, converted where nothing was trained, or null where that or the source was not measured
    measured        {file: identity} of what was compared: another one now means that this is of the past
    margins, seed   what the verdict was fixed to beforehand; margin: that of accuracy
    status, judged  the verdict and what it rests on, see verdict.py
    gate            {state, passed, reasons}, see gate.py
    mean_accuracy   {tasks, metrics, n, before, after, delta, ci95, margin, verdict} over one 0/1 metric a
                    task, passkey and needle apart, or null
    tasks           {task: {metric: {kind, n, before, after, delta, ci95, p_value, lost, gained, verdict, primary,
                    margin, p_holm, p_inferior, p_inferior_holm}}}; the last three for the primary metric of a task only
    perplexity      {name: {n, tokens, before, after, delta, ci95, relative_ci95, p_value, lost, gained}}: held-out text
                    and text files; of tasks it stands with them
    agreement       {kl, top1, ci95} with the source model on held-out text, or null
    problems        what could not be compared, in words
"""

import math
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import read_json, write_json
from ..run_folder import PointFolder, RunFolder
from . import retrieval
from .missing import missing
from .paired import Comparison, compare, compare_likelihoods, macro_average
from .stale import stale_points
from .statistics import holm, p_inferior
from .verdict import JUDGED_UNITS, Margins, judge

Json = dict[str, Any]

COMPARED = ("held_out", "agreement")
"""What is compared of a point beside its tasks and text files."""
_RANK = {"acc_norm": 0, "acc": 1, "word_perplexity": 2}
"""Preferred metric of a task; acc_norm is the likelihood per character, which does not favour short answers."""


def write_comparison(run: RunFolder, *, margins: Margins, seed: int) -> Json:
    """Compute `compare_run` and write it as eval/comparison.json."""
    result = compare_run(run, margins=margins, seed=seed)
    write_json(run.evaluation.comparison, result)
    return result


def compare_run(run: RunFolder, *, margins: Margins, seed: int) -> Json:
    """Compare `before` with the last point of a run."""
    return compare_points(run, "before", run.last_point, margins=margins, seed=seed)


def compare_points(run: RunFolder, left: str, right: str, *, margins: Margins, seed: int) -> Json:
    """Compare two measured points, document by document and window by window (see above).

    Args:
        run: its folder.
        left, right: points; the differences are right - left. Where one of them was not measured, `compared` is None.
        margins: of the verdict.
        seed: of the resampling.
    """
    points = [run.evaluation.point(side) for side in (left, right)]
    sides = [read_json(one.results.path) or {} for one in points]
    point, margin = right if all(sides) else None, margins.accuracy
    comparisons, problems = _tasks(points, list(sides[0]["tasks"]), margin, seed) if point else ([], [])
    if point and sides[0].get("specification_hash") != sides[1].get("specification_hash"):
        problems.append("The points were not measured alike: their evaluation specifications differ.")
    chosen = primary(comparisons)
    # Retrieval is judged by itself: how much it would weigh in a mean depends on the grid that was asked for.
    averaged = [c for c in chosen if c.kind == "binary" and c.task not in retrieval.names()]
    summary = macro_average(averaged, margin=margin, seed=seed)
    if summary is not None:
        summary["metrics"] = {c.task: c.metric for c in averaged if c.verdict}
    tasks = _table(comparisons, chosen, margin)
    texts, one_sided = _texts(points, seed) if point else ({}, [])
    problems += one_sided
    problems += [
        f"{name}: the model is not the one that was measured; it was made anew or changed since."
        for name in stale_points(run)
        if name in (left, right)
    ]
    if point:
        lacks = missing(run)
        problems += [f"{name}: not measured: {', '.join(lacks[name])}." for name in (left, right) if name in lacks]
    agreement = _agreement(points[1]) if point and left == "before" else None
    return {
        "compared": point,
        "measured": measured(run, left, right),
        "margin": margin,
        "margins": margins.as_dict(),
        "seed": seed,
        "mean_accuracy": summary,
        "tasks": tasks,
        "perplexity": texts,
        "agreement": agreement,
        "problems": problems,
        **judge(summary, tasks, texts, agreement, problems, margins),
    }


def measured(run: RunFolder, left: str, right: str) -> dict[str, str | None]:
    """What there is at both points: file -> the identity of what it was measured on and how."""
    found: dict[str, str | None] = {}
    folder = run.evaluation.path
    for one in map(run.evaluation.point, (left, right)):
        files = (*one.task_files, *map(one.measured, COMPARED), *one.text_files.values())
        found |= {str(file.relative_to(folder)): (read_json(file) or {}).get("identity") for file in files}
        found[str(one.results.path.relative_to(folder))] = (read_json(one.results.path) or {}).get("specification_hash")
    return {file: identity for file, identity in found.items() if identity is not None}


def primary(comparisons: list[Comparison]) -> list[Comparison]:
    """One metric a task: accuracy per character if it has it, else accuracy, else word perplexity, else its first.

    Metrics that can be held against a margin come before those that cannot.
    """
    chosen: dict[str, Comparison] = {}
    for comparison in comparisons:
        current = chosen.get(comparison.task)
        if current is None or _preference(comparison) < _preference(current):
            chosen[comparison.task] = comparison
    return list(chosen.values())


def _preference(comparison: Comparison) -> tuple[bool, int, bool]:
    judged = bool(comparison.verdict) or comparison.metric in JUDGED_UNITS
    return not judged, _RANK.get(comparison.metric, 3), comparison.kind != "binary"


def _tasks(points: list[PointFolder], names: list[str], margin: float, seed: int) -> tuple[list[Comparison], list[str]]:
    """The comparisons of all tasks and metrics, and why some are missing."""
    found: list[Comparison] = []
    problems: list[str] = []
    for name in names:
        before, after = (read_json(point.task(name)) for point in points)
        if before is None or after is None:
            problems.append(f"{name}: no per-document results for both points, so no interval.")
            continue
        try:
            found += compare(before, after, margin=margin, seed=seed)
        except InputError as error:
            problems.append(str(error).replace("\n", " "))
    return found, problems


def _table(comparisons: list[Comparison], chosen: list[Comparison], margin: float) -> dict[str, dict[str, Json]]:
    """All comparisons by task and metric, with Holm's correction over the tasks' primary metrics."""
    tested = {c.task: c.p_value for c in chosen if c.p_value is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    judged = [c for c in chosen if c.verdict and c.kind == "binary"]
    worse = [p_inferior(c.strata, margin) for c in judged]
    inferior = {c.task: pair for c, *pair in zip(judged, worse, holm(worse), strict=True)}
    table: dict[str, dict[str, Json]] = {}
    for comparison in comparisons:
        is_primary = any(comparison is one for one in chosen)
        p, p_holm = inferior.get(comparison.task, (None, None)) if is_primary else (None, None)
        table.setdefault(comparison.task, {})[comparison.metric] = {
            **comparison.as_dict(),
            "primary": is_primary,
            "margin": margin,
            "p_holm": adjusted.get(comparison.task) if is_primary else None,
            "p_inferior": p,
            "p_inferior_holm": p_holm,
        }
    return table


def _texts(points: list[PointFolder], seed: int) -> tuple[dict[str, Json], list[str]]:
    """Perplexity of the held-out text and of text files, compared window by window; and what could not be."""
    files = {"held_out": "held_out"}
    files |= {name: f"perplexity/{name}" for name in points[0].text_files}
    table, problems = {}, []
    for name, file in files.items():
        both = [read_json(point.measured(file)) for point in points]
        sides: list[Any] = [(one or {}).get("windows") for one in both]
        if not any(sides) or None in both:  # what is missing is told by missing.py
            continue
        if not all(sides) or [tokens for _, tokens in sides[0]] != [tokens for _, tokens in sides[1]]:
            problems.append(f"{name}: its perplexity was not measured on the same windows at both points.")
            continue
        pairs = np.array([[(-_summed(nats), tokens) for nats, tokens in side] for side in sides]).swapaxes(0, 1)
        found = compare_likelihoods(name, "perplexity", pairs, seed=seed)
        table[name] = {key: value for key, value in found.as_dict().items() if key not in ("kind", "verdict")}
        table[name]["relative_ci95"] = found.relative_ci95  # None for a single window
        table[name]["tokens"] = int(pairs[:, 0, 1].sum())
    return table, problems


def _summed(nats: float | None) -> float:
    """The nats of a window; JSON's null stands for what is no number."""
    return math.inf if nats is None else nats


def _agreement(point: PointFolder) -> Json | None:
    """KL from the source model and top-1 agreement with it at a point."""
    found = read_json(point.measured("agreement"))
    if not found:
        return None
    return {"kl": found["kl"], "top1": found["top1"], "ci95": {"kl": None, "top1": None} | (found.get("ci95") or {})}
