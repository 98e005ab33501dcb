"""Paired comparison of two evaluations of the same documents.

Before and after are measured on the same documents, so their scores are strongly correlated and the difference is
known far better than either score. Comparing two standard errors, as for independent samples, throws that away.

    0/1 metrics    exact McNemar test on the discordant documents; interval for the difference of paired proportions
    perplexities   per-document differences of log-likelihood: sign-flip test, bootstrap over documents
    other numbers  sign-flip test and bootstrap on the per-document differences

All random numbers come from a seed: the same files give the same report. Imports numpy and scipy only.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

Array = NDArray[np.float64]

RESAMPLES = 10_000
_Z = 1.959963984540054  # 97.5% quantile of the normal distribution
_IDENTITY = ("task", "doc_id", "doc_hash", "prompt_hash", "target_hash")
_CHUNK = 4_000_000  # random indices drawn at a time, 32 MB


@dataclass(frozen=True)
class Comparison:
    """One metric of one task, before and after, on the same n documents."""

    task: str
    metric: str
    kind: str
    """binary, likelihood or number."""
    n: int
    before: float
    after: float
    delta: float
    """after - before, in the metric's unit."""
    ci95: tuple[float, float]
    p_value: float
    """Two-sided, of no difference: exact McNemar (binary) or sign-flip permutation."""
    lost: int
    """Documents that got worse (binary: right before, wrong after)."""
    gained: int
    verdict: str = ""
    """See `verdict`; only for 0/1 metrics, whose margin is in accuracy."""
    differences: Array = field(repr=False, default_factory=lambda: np.zeros(0))
    """Per document, after - before: in accuracy, or in nats of log-likelihood (positive is better)."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the per-document differences."""
        return {key: value for key, value in asdict(self).items() if key not in ("differences", "task", "metric")}


def compare(before: dict[str, Any], after: dict[str, Any], *, margin: float = 0.01, seed: int = 0) -> list[Comparison]:
    """Compare two task files (`tasks/<task>.json`) metric by metric.

    Raises:
        InputError: the files are about different tasks, documents or prompts.
    """
    left, right = pair(before, after)
    metrics = list(dict.fromkeys(name for entry in left for name in entry["metrics"]))
    found = []
    for metric in metrics:
        rows = [(a["metrics"][metric], b["metrics"][metric]) for a, b in zip(left, right, strict=True)
                if metric in a["metrics"] and metric in b["metrics"]]  # fmt: skip
        comparison = _compare_metric(before["task"], metric, rows, margin, seed)
        if comparison is not None:
            found.append(comparison)
    return found


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


def _compare_metric(task: str, metric: str, rows: list[Any], margin: float, seed: int) -> Comparison | None:
    if all(isinstance(value, (list, tuple)) and len(value) == 2 for row in rows for value in row):
        pairs = np.array(rows, dtype=np.float64)  # [documents, before/after, (log-likelihood, units)]
        return _compare_likelihood(task, metric, pairs, seed)
    if not all(isinstance(value, (int, float)) for row in rows for value in row):
        return None  # lists of tokens and the like: corpus metrics that have no value per document
    values = np.array(rows, dtype=np.float64)
    before, after = values[:, 0], values[:, 1]
    differences = after - before
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    lost, gained = int((differences < 0).sum()), int((differences > 0).sum())
    interval = paired_interval(differences, seed=seed) if binary else bootstrap_interval(differences, seed=seed)
    return Comparison(
        task, metric, "binary" if binary else "number", len(values), float(before.mean()), float(after.mean()),
        float(differences.mean()), interval, mcnemar(lost, gained) if binary else sign_flip(differences, seed=seed),
        lost, gained, verdict(interval, margin) if binary else "", differences,
    )  # fmt: skip


def _compare_likelihood(task: str, metric: str, pairs: Array, seed: int) -> Comparison:
    """Perplexity-like metrics, from the summed log-likelihood over the summed units of all documents."""
    link = _link(metric)
    units = pairs[:, 0, 1]
    before, after = pairs[:, 0, 0], pairs[:, 1, 0]
    nats = after - before

    def delta(chosen: NDArray[np.int64]) -> Array:
        total = units[chosen].sum(axis=1)
        return link(-after[chosen].sum(axis=1) / total) - link(-before[chosen].sum(axis=1) / total)

    everything = np.arange(len(pairs))[None]
    values = [float(link(-side.sum() / units.sum())) for side in (before, after)]
    return Comparison(
        task, metric, "likelihood", len(pairs), values[0], values[1], float(delta(everything)[0]),
        _percentiles(_resample(delta, len(pairs), seed)), sign_flip(nats, seed=seed),
        int((nats < 0).sum()), int((nats > 0).sum()), "", nats,
    )  # fmt: skip


def _link(metric: str) -> Callable[[Any], Any]:
    """From mean nats per unit to the metric, as lm-eval aggregates it."""
    return (lambda nats: nats / math.log(2)) if metric.startswith("bits_per") else np.exp


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided McNemar test: the discordant documents as fair coin flips (McNemar 1947; binomial form)."""
    from scipy.stats import binomtest

    return 1.0 if lost + gained == 0 else float(binomtest(lost, lost + gained, 0.5).pvalue)


def sign_flip(differences: Array, *, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided permutation test of a zero mean difference: every document's sign is flipped at random.

    Up to 12 documents all sign patterns are counted; beyond that `resamples` random ones, with the observed pattern
    counted as one of them, so that p is never 0 (Phipson and Smyth 2010).
    """
    observed, tolerance = abs(differences.sum()), 1e-12 * np.abs(differences).sum()
    if len(differences) <= 12:
        bits = np.arange(2 ** len(differences))[:, None] >> np.arange(len(differences)) & 1
        return float((np.abs((1 - 2 * bits) @ differences) >= observed - tolerance).mean())
    rng = np.random.default_rng(seed)
    extreme, rows = 0, max(1, _CHUNK // len(differences))
    for start in range(0, resamples, rows):
        signs = 1 - 2 * rng.integers(0, 2, size=(min(rows, resamples - start), len(differences)), dtype=np.int8)
        extreme += int((np.abs(signs @ differences) >= observed - tolerance).sum())
    return (extreme + 1) / (resamples + 1)


def bootstrap_interval(differences: Array, *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95% percentile interval of the mean difference, resampling documents."""
    return _percentiles(_resample(lambda chosen: differences[chosen].mean(axis=1), len(differences), seed, resamples))


def paired_interval(differences: Array, *, seed: int = 0) -> tuple[float, float]:
    """95% interval for the difference of two paired proportions: the wider of bootstrap and adjusted Wald.

    With few discordant documents the bootstrap collapses (none at all: to a point) and would call eight rows proof.
    The adjusted Wald interval of Bonett and Price (2012) adds one document to each discordant cell, which keeps the
    coverage near 95% down to small n. With many documents the two agree.
    """
    low, high = bootstrap_interval(differences, seed=seed)
    centre, variance = _adjusted_moments(differences)
    half = _Z * math.sqrt(variance)
    return max(-1.0, min(low, centre - half)), min(1.0, max(high, centre + half))


def _adjusted_moments(differences: Array) -> tuple[float, float]:
    """Centre and variance of the adjusted Wald interval (Bonett and Price 2012)."""
    n = len(differences) + 2
    lost, gained = ((differences < 0).sum() + 1) / n, ((differences > 0).sum() + 1) / n
    return float(gained - lost), float((gained + lost - (gained - lost) ** 2) / n)


def macro_average(comparisons: list[Comparison], *, margin: float, seed: int = 0) -> dict[str, Any] | None:
    """Mean accuracy difference over tasks, each task weighing the same, with an interval and the verdict.

    Documents are resampled within each task. None without 0/1 metrics.
    """
    chosen = [comparison for comparison in comparisons if comparison.kind == "binary"]
    if not chosen:
        return None
    draws = np.mean([_resample(lambda index, d=c.differences: d[index].mean(axis=1), c.n, seed + i)
                     for i, c in enumerate(chosen)], axis=0)  # fmt: skip
    moments = [_adjusted_moments(comparison.differences) for comparison in chosen]
    centre = float(np.mean([moment[0] for moment in moments]))
    half = _Z * math.sqrt(sum(moment[1] for moment in moments)) / len(chosen)
    low, high = _percentiles(draws)
    interval = (min(low, centre - half), max(high, centre + half))
    return {
        "tasks": [comparison.task for comparison in chosen], "n": sum(comparison.n for comparison in chosen),
        "before": float(np.mean([comparison.before for comparison in chosen])),
        "after": float(np.mean([comparison.after for comparison in chosen])),
        "delta": float(np.mean([comparison.delta for comparison in chosen])),
        "ci95": interval, "margin": margin, "verdict": verdict(interval, margin),
    }  # fmt: skip


def verdict(interval: tuple[float, float], margin: float) -> str:
    """Non-inferiority at a margin fixed beforehand, for a metric where higher is better.

    `within_margin`: the whole interval lies above -margin. `margin_broken`: all of it lies below. Otherwise
    `not_enough_rows`: the data cannot tell.
    """
    low, high = interval
    if low > -margin:
        return "within_margin"
    return "margin_broken" if high < -margin else "not_enough_rows"


def _resample(statistic: Callable[[Any], Array], n: int, seed: int, resamples: int = RESAMPLES) -> Array:
    """`statistic` of `resamples` bootstrap samples; it gets indices [rows, n] and returns [rows]."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // max(n, 1))
    return np.concatenate([statistic(rng.integers(0, n, size=(min(rows, resamples - start), n)))
                           for start in range(0, resamples, rows)])  # fmt: skip


def _percentiles(draws: Array) -> tuple[float, float]:
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)
