"""Tests and intervals, as plain functions of numbers.

Before and after are measured on the same documents, so their scores are strongly correlated and the difference is
known far better than either score. Everything here takes the per-document difference, after - before.

All random numbers come from a seed: the same files give the same report. Imports numpy and scipy only. How often the
intervals cover the truth and how often the verdicts err is measured by `benchmarks/statistics_check.py`.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Interval = tuple[float, float]
Weights = list[float] | None

WITHIN, BROKEN, INCONCLUSIVE = "within_margin", "margin_broken", "inconclusive"
"""See `verdict`."""
RESAMPLES = 10_000
_Z = 1.959963984540054  # 97.5% quantile of the normal distribution
_CHUNK = 4_000_000  # random indices drawn at a time, 32 MB


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided McNemar test: the discordant documents as fair coin flips (McNemar 1947; binomial form)."""
    from scipy.stats import binomtest

    return 1.0 if lost + gained == 0 else float(binomtest(lost, lost + gained, 0.5).pvalue)


def sign_flip(differences: Array, *, seed: int = 0, resamples: int = RESAMPLES) -> float | None:
    """Two-sided permutation test of a zero mean difference: every document's sign is flipped at random.

    None where a difference is not finite.

    Up to 12 documents all sign patterns are counted; beyond that `resamples` random ones, with the observed pattern
    counted as one of them, so that p is never 0 (Phipson and Smyth 2010).
    """
    if not np.isfinite(differences).all():
        return None
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


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p-values of a family of tests, in the order given: below 0.05 the familywise error is (Holm 1979)."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def bootstrap_interval(groups: list[Array], *, weights: Weights = None, seed: int = 0) -> Interval:
    """95% percentile interval of the mean over groups, resampling documents within each; see `paired_interval`."""
    draws = [_means(differences, seed + i) for i, differences in enumerate(groups)]
    return percentiles(np.average(draws, axis=0, weights=weights))


def student(values: Array, centre: float) -> Interval:
    """95% interval around `centre` from the spread of n >= 2 independent contributions whose mean it is."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return centre - half, centre + half


def mean_interval(groups: list[Array], *, seed: int = 0) -> Interval | None:
    """95% interval of a mean difference, over groups weighing the same: the wider of bootstrap and Student's t, whose
    degrees of freedom are Welch's and Satterthwaite's; None if a group has fewer than two documents, or a difference is
    not finite.

    The percentile bootstrap is too narrow for a handful of documents, the t interval blind to skewness.
    """
    from scipy.stats import t

    if min(map(len, groups)) < 2:
        return None
    parts = np.array([group.var(ddof=1) / len(group) for group in groups]) / len(groups) ** 2
    variance, centre = parts.sum(), float(np.mean([group.mean() for group in groups]))
    below = sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    half = float(t.ppf(0.975, variance**2 / below) * math.sqrt(variance)) if variance > 0 else 0.0
    return known(_wider(bootstrap_interval(groups, seed=seed), (centre - half, centre + half)))


def wald(groups: list[Array], weights: Weights = None) -> Interval:
    """95% adjusted Wald interval of the mean, over groups weighing the same, of differences of paired proportions."""
    centre, error = _adjusted(groups, weights)
    return centre - _Z * error, centre + _Z * error


def p_inferior(groups: list[Array], margin: float) -> float:
    """One-sided p-value of "the loss is within the margin": small means worse by more than the margin.

    From the centre and the standard error of the adjusted Wald interval, so that it agrees with that interval; the
    loss is the mean over groups weighing the same.
    """
    centre, error = _adjusted(groups)
    return 0.5 * math.erfc(-(centre + margin) / error / math.sqrt(2))


def _adjusted(groups: list[Array], weights: Weights = None) -> tuple[float, float]:
    """Centre and standard error of the adjusted Wald interval of the groups' mean (Bonett and Price 2012)."""
    centre = variance = 0.0
    for differences, weight in zip(groups, weights or [1 / len(groups)] * len(groups), strict=True):
        n = len(differences) + 2
        lost, gained = ((differences < 0).sum() + 1) / n, ((differences > 0).sum() + 1) / n
        centre += (gained - lost) * weight
        variance += (gained + lost - (gained - lost) ** 2) / n * weight**2
    return float(centre), math.sqrt(variance)


def paired_interval(groups: list[Array], *, weights: Weights = None, seed: int = 0) -> Interval:
    """95% interval of the mean, over groups, of differences of paired proportions: the wider of bootstrap and Wald.

    The percentile bootstrap resamples documents within each group; alone it has no width where no document differs.
    The adjusted Wald interval of Bonett and Price (2012) adds one document to each discordant cell, which keeps the
    coverage near 95% down to small n. With many documents the two agree.

    Args:
        groups: differences of each, document by document.
        weights: of the groups, which add up to 1; None: the same for all.
        seed: of the resampling.
    """
    low, high = _wider(bootstrap_interval(groups, weights=weights, seed=seed), wald(groups, weights))
    return max(-1.0, low), min(1.0, high)


def wilson(share: float, n: float, quantile: float = _Z) -> Interval:
    """95% interval of a share of `n` independent trials, which never leaves [0, 1] (Wilson 1927)."""
    square = quantile**2 / n
    centre = (share + square / 2) / (1 + square)
    half = quantile / (1 + square) * math.sqrt(share * (1 - share) / n + square / n / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_share(shares: Array, trials: int) -> Interval | None:
    """95% interval of a share over groups of `trials` trials each, from every group's share; None below two groups.

    Trials of one group (tokens of one text) are alike, so there are fewer of them in effect: Wilson's interval at the
    number of independent trials whose variance the groups' mean shows (Korn and Graubard 1998), never more than there
    are, with Student's quantile at the groups' degrees of freedom.
    """
    from scipy.stats import t

    if len(shares) < 2:
        return None
    mean, total = float(shares.mean()), float(len(shares) * trials)
    variance = float(shares.var(ddof=1)) / len(shares)
    effective = min(total, mean * (1 - mean) / variance) if variance > 0 and 0 < mean < 1 else total
    return wilson(mean, effective, float(t.ppf(0.975, len(shares) - 1)))


def positive_interval(values: Array, *, seed: int = 0) -> Interval | None:
    """`mean_interval` of what cannot be negative."""
    found = mean_interval([values], seed=seed)
    return found and (max(0.0, found[0]), found[1])


def verdict(interval: Interval, margin: float) -> str:
    """Non-inferiority at a margin fixed beforehand, for a metric where higher is better.

    `within_margin`: the whole 95% interval lies above -margin, non-inferiority is shown (wrongly so in at most 2.5%
    of the cases). `margin_broken`: all of it lies below, inferiority is shown. `inconclusive`: the data cannot tell.
    """
    low, high = interval
    if low > -margin:
        return WITHIN
    return BROKEN if high < -margin else INCONCLUSIVE


def rise_verdict(interval: Interval | None, margin: float) -> str:
    """The same for a change where lower is better; `margin`: the largest rise. Without an interval nothing is shown."""
    return INCONCLUSIVE if interval is None else verdict((-interval[1], -interval[0]), margin)


def _means(differences: Array, seed: int, resamples: int = RESAMPLES) -> Array:
    """Means of bootstrap samples. Of few distinct values (-1, 0, 1) only their counts are drawn, which is the same."""
    values, counts = np.unique(differences, return_counts=True)
    if len(values) > 16:
        return resample(lambda chosen: differences[chosen].mean(axis=1), len(differences), seed, resamples)
    drawn = np.random.default_rng(seed).multinomial(len(differences), counts / len(differences), size=resamples)
    return drawn @ values / len(differences)


def resample(statistic: Callable[[Any], Array], n: int, seed: int, resamples: int = RESAMPLES) -> Array:
    """`statistic` of `resamples` bootstrap samples; it gets indices [rows, n] and returns [rows]."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // max(n, 1))
    return np.concatenate([statistic(rng.integers(0, n, size=(min(rows, resamples - start), n)))
                           for start in range(0, resamples, rows)])  # fmt: skip


def known(interval: Interval) -> Interval | None:
    """An interval between numbers; None for any other, of which nothing is known."""
    return interval if all(map(math.isfinite, interval)) else None


def percentiles(draws: Array) -> Interval:
    """The middle 95% of bootstrap draws."""
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


def _wider(one: Interval, other: Interval) -> Interval:
    return min(one[0], other[0]), max(one[1], other[1])
