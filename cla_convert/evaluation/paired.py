"""Paired comparison of two evaluations of the same documents.

    0/1 metrics    exact McNemar test on the discordant documents; interval for the difference of paired proportions
    perplexities   per-document differences of log-likelihood: sign-flip test, interval over documents
    other numbers  sign-flip test and interval on the per-document differences
    of all at once no value per document, so no test and no interval (bleu, mcc, the f1 of multiple choice)

A group of tasks whose score is the mean over its tasks, however long each is (`weight_by_size: false`), is compared so:
documents are resampled within each task, and the test is the sign-flip test of the weighted differences. Whatever else
is not what comes of its documents one by one (a mean of perplexities) counts as a metric of all at once.

The tests and intervals themselves are in `statistics.py`.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .statistics import (
    Array,
    Interval,
    known,
    mcnemar,
    mean_interval,
    paired_interval,
    percentiles,
    resample,
    sign_flip,
    student,
    verdict,
)

_IDENTITY = ("task", "doc_id", "doc_hash", "prompt_hash", "target_hash")


@dataclass(frozen=True)
class Comparison:
    """One metric of one task, before and after, on the same n documents."""

    task: str
    metric: str
    kind: str
    """binary, likelihood, number or corpus."""
    n: int
    before: float
    after: float
    delta: float
    """after - before, in the metric's unit."""
    ci95: Interval | None
    """95% interval of delta; None where one document says nothing about the spread, or a value is no number."""
    p_value: float | None
    """Two-sided, of no difference: exact McNemar (binary) or sign-flip permutation. None where nothing is tested."""
    lost: int
    """Documents that got worse (binary: right before, wrong after)."""
    gained: int
    verdict: str = ""
    """See `statistics.verdict`; only for metrics between 0 and 1 where 1 is good: the margin is in accuracy."""
    relative_ci95: Interval | None = None
    """Of perplexities: 95% interval of after / before - 1."""
    strata: list[Array] = field(repr=False, default_factory=lambda: [np.zeros(0)])
    """Per document, after - before, in accuracy or in nats of log-likelihood (positive is better): of all documents, or
    of every subtask where these weigh the same."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the per-document differences."""
        left_out = {"strata", "task", "metric"} | ({"relative_ci95"} if self.relative_ci95 is None else set())
        return {key: value for key, value in asdict(self).items() if key not in left_out}


def compare(before: dict[str, Any], after: dict[str, Any], *, margin: float = 0.01, seed: int = 0) -> list[Comparison]:
    """Compare two task files (`tasks/<task>.json`) metric by metric.

    Raises:
        InputError: the files are about different tasks, documents or prompts.
    """
    left, right = pair(before, after)
    metrics = list(dict.fromkeys(name for entry in left for name in entry["metrics"]))
    if before.get("subtasks"):  # of a group: what only some of its tasks have would pass for a measure of all
        metrics = [metric for metric in metrics if metric in before["scores"]]
    found = []
    for metric in metrics:
        rows = [(a["task"], a["metrics"][metric], b["metrics"][metric]) for a, b in zip(left, right, strict=True)
                if metric in a["metrics"] and metric in b["metrics"]]  # fmt: skip
        comparison = _of_documents(before, after, metric, rows, margin, seed)
        if comparison is None:
            comparison = _of_corpus(before, after, metric, len(rows))
        # lm-eval says it of a metric, which may come through several filters: `ter,first` is of `ter`.
        better = before.get("higher_is_better", {}).get(metric.partition(",")[0], True)
        found.append(comparison if better else _turned(comparison))
    return found


def _of_documents(
    before: dict[str, Any], after: dict[str, Any], metric: str, rows: list[Any], margin: float, seed: int
) -> Comparison | None:
    """The comparison document by document whose numbers are those of the score, if there is one."""
    equal: Any = before.get("equal_weights", [])
    ways = [metric in equal] if "equal_weights" in before or not before.get("subtasks") else [False, True]
    for by_task in ways:  # of older results only the numbers tell
        parts = [part if by_task else "" for part, *_ in rows]
        found = _compare_metric(before["task"], metric, parts, [pair for _, *pair in rows], margin, seed)
        if found and _is_score(before, metric, found.before) and _is_score(after, metric, found.after):
            return found
    return None


def _is_score(side: dict[str, Any], metric: str, value: float) -> bool:
    """Whether a number is the score of a task file, as far as that tells."""
    score = side.get("scores", {}).get(metric)
    if score is None or not (math.isfinite(score) and math.isfinite(value)):
        return True
    return math.isclose(score, value, rel_tol=1e-6, abs_tol=1e-9)


def _turned(comparison: Comparison) -> Comparison:
    """Of a metric where less is better: no accuracy has its margin. Likelihoods know by themselves what is worse."""
    if comparison.kind == "likelihood":
        return replace(comparison, verdict="")
    return replace(comparison, verdict="", lost=comparison.gained, gained=comparison.lost)


def pair(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The entries of both files, aligned. Refuses anything but the same documents under the same prompts."""
    what = f"The two results of {before.get('task')!r} cannot be compared"
    if before.get("task") != after.get("task"):
        raise InputError(what, f"The other one is about {after.get('task')!r}.")
    counts = len(before["samples"]), len(after["samples"])
    if counts[0] != counts[1]:
        raise InputError(what, f"{counts[0]} and {counts[1]} documents.", "Evaluate both with the same limit.")
    for a, b in zip(before["samples"], after["samples"], strict=True):
        differing = [key for key in _IDENTITY if a.get(key) != b.get(key)]
        if sorted(a["metrics"]) != sorted(b["metrics"]):
            differing.append("metrics")
        if differing:
            raise InputError(
                what,
                f"Document {a.get('doc_id')} differs in {', '.join(differing)}.",
                "Evaluate both with the same recipe and the same lm-eval version.",
            )
    return before["samples"], after["samples"]


def _compare_metric(
    task: str, metric: str, parts: list[str], rows: list[Any], margin: float, seed: int
) -> Comparison | None:
    """None for a metric that has no value per document, whatever lm-eval keeps of each.

    Args:
        task, metric: how to call it.
        parts: of every document, what it belongs to; each weighs the same.
        rows: of every document, before and after.
        margin, seed: as `compare`.
    """
    if _is_likelihood(metric):
        if len(set(parts)) > 1:
            return None
        # lm-eval keeps of one answer a document its log-likelihood, without a count
        rows = [[value if isinstance(value, (list, tuple)) else (value, 1) for value in row] for row in rows]
        pairs = np.array(rows, dtype=np.float64)  # [documents, before/after, (log-likelihood, units)]
        return compare_likelihoods(task, metric, pairs, seed=seed)
    if not all(value is None or isinstance(value, (int, float)) for row in rows for value in row):
        return None  # an answer and what it should be, for a metric of all of them at once
    given = [index for index, row in enumerate(rows) if row != [None, None]]  # some tasks leave documents out
    if not given:
        return None
    values = np.array([rows[index] for index in given], dtype=np.float64)  # None, JSON's for no number, becomes NaN
    members = _members([parts[index] for index in given])
    before, after = (float(np.mean([values[one, side].mean() for one in members])) for side in (0, 1))
    differences = values[:, 1] - values[:, 0]
    strata = [differences[one] for one in members]
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    lost, gained = int((differences < 0).sum()), int((differences > 0).sum())
    interval = paired_interval(strata, seed=seed) if binary else mean_interval(strata, seed=seed)
    if binary and len(strata) == 1:
        p_value = mcnemar(lost, gained)
    else:
        p_value = sign_flip(np.concatenate([one * len(differences) / len(one) for one in strata]), seed=seed)
    a_share = bool(((values >= 0) & (values <= 1)).all())
    return Comparison(
        task, metric, "binary" if binary else "number", len(values), before, after,
        float(np.mean([one.mean() for one in strata])), interval, p_value, lost, gained,
        verdict(interval, margin) if a_share and interval else "", None, strata,
    )  # fmt: skip


def _members(parts: list[str]) -> list[NDArray[np.int64]]:
    """Indices of what belongs together, in order of appearance."""
    names = np.array(parts)
    return [np.flatnonzero(names == name) for name in dict.fromkeys(parts)]


def _is_likelihood(metric: str) -> bool:
    name = metric.partition(",")[0]
    return name in ("perplexity", "word_perplexity", "byte_perplexity") or name.startswith("bits_per")


def _of_corpus(before: dict[str, Any], after: dict[str, Any], metric: str, n: int) -> Comparison:
    """What is known of a metric of all documents at once: its two values."""
    values = [side.get("scores", {}).get(metric) for side in (before, after)]
    old, new = (math.nan if value is None else float(value) for value in values)
    return Comparison(before["task"], metric, "corpus", n, old, new, new - old, None, None, 0, 0)


def compare_likelihoods(task: str, metric: str, pairs: Array, *, seed: int = 0) -> Comparison:
    """Compare perplexity-like metrics: summed log-likelihood over the summed units of all documents.

    Args:
        task, metric: how to call it; a metric `bits_per_...` is in bits per unit, any other a perplexity.
        pairs: [documents, before/after, (log-likelihood in nats, units)].
        seed: of the resampling.
    """
    link = _link(metric)
    units = pairs[:, 0, 1]
    before, after = pairs[:, 0, 0], pairs[:, 1, 0]
    nats = after - before

    def delta(chosen: NDArray[np.int64]) -> Array:
        total = units[chosen].sum(axis=1)
        return link(-after[chosen].sum(axis=1) / total) - link(-before[chosen].sum(axis=1) / total)

    change = float(delta(np.arange(len(pairs))[None])[0])
    values = [float(link(-side.sum() / units.sum())) for side in (before, after)]
    return Comparison(
        task, metric, "likelihood", len(pairs), values[0], values[1], change,
        _likelihood_interval(delta, change, _influence(pairs, metric), seed), sign_flip(nats, seed=seed),
        int((nats < 0).sum()), int((nats > 0).sum()), "",
        None if metric.startswith("bits_per") else ratio_interval(nats, units, seed), [nats],
    )  # fmt: skip


def ratio_interval(nats: Array, units: Array, seed: int) -> Interval | None:
    """95% interval of after / before - 1 of a perplexity: `_likelihood_interval`, on the logarithm of the ratio."""

    def logarithm(chosen: NDArray[np.int64]) -> Array:
        return -nats[chosen].sum(axis=1) / units[chosen].sum(axis=1)

    change = float(-nats.sum() / units.sum())
    found = _likelihood_interval(logarithm, change, (-nats - change * units) / units.mean(), seed)
    return found and (math.expm1(min(found[0], 700.0)), math.expm1(min(found[1], 700.0)))


def _likelihood_interval(delta: Any, change: float, influence: Array, seed: int) -> Interval | None:
    """The wider of bootstrap and linearised t interval: with three pages the bootstrap alone is far too sure."""
    if len(influence) < 2:
        return None
    draws, linear = percentiles(resample(delta, len(influence), seed)), student(influence, change)
    return known((min(draws[0], linear[0]), max(draws[1], linear[1])))


def _influence(pairs: Array, metric: str) -> Array:
    """What each document contributes to the change of the metric, to first order (delta method for a ratio)."""
    units = pairs[:, 0, 1]
    total = np.zeros(len(pairs))
    for side, sign in ((0, -1.0), (1, 1.0)):
        mean = -pairs[:, side, 0].sum() / units.sum()
        slope = 1 / math.log(2) if metric.startswith("bits_per") else math.exp(min(mean, 700.0))
        total += sign * slope * (-pairs[:, side, 0] - mean * units) / units.mean()
    return total


def _link(metric: str) -> Callable[[Any], Any]:
    """From mean nats per unit to the metric, as lm-eval aggregates it."""
    return (lambda nats: nats / math.log(2)) if metric.startswith("bits_per") else np.exp


def macro_average(comparisons: list[Comparison], *, margin: float, seed: int = 0) -> dict[str, Any] | None:
    """Mean accuracy difference over tasks, each task weighing the same, with an interval and the verdict.

    Documents are resampled within each task, and within each subtask where these weigh the same. None without 0/1
    metrics.
    """
    chosen = [comparison for comparison in comparisons if comparison.verdict]
    if not chosen:
        return None
    strata = [(one, 1 / len(chosen) / len(comparison.strata)) for comparison in chosen for one in comparison.strata]
    groups, weights = [one for one, _ in strata], [weight for _, weight in strata]
    interval = paired_interval(groups, weights=weights, seed=seed)
    return {
        "tasks": [comparison.task for comparison in chosen], "n": sum(comparison.n for comparison in chosen),
        "before": float(np.mean([comparison.before for comparison in chosen])),
        "after": float(np.mean([comparison.after for comparison in chosen])),
        "delta": float(np.mean([comparison.delta for comparison in chosen])),
        "ci95": interval, "margin": margin, "verdict": verdict(interval, margin),
    }  # fmt: skip
