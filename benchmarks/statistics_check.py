"""How often the intervals of a report cover the truth, and how often its verdicts and its gate err, by simulation.

    python benchmarks/statistics_check.py [--runs 2000]

Every run draws a data set with a known truth and asks the shipped code. Prints a Markdown table: docs/measurements.md.
"""

import argparse
from collections.abc import Callable

import numpy as np

from cla_convert.evaluation import statistics
from cla_convert.evaluation.paired import compare_likelihoods
from cla_convert.evaluation.verdict import LEVEL

MARGIN = 0.01
Rng = np.random.Generator


def paired(rng: Rng, n: int, lost: float, gained: float) -> np.ndarray:
    """Differences of paired 0/1 scores."""
    return rng.choice([-1.0, 0.0, 1.0], p=[lost, 1 - lost - gained, gained], size=n)


def covers(interval: tuple[float, float] | None, truth: float) -> bool:
    return interval is not None and interval[0] <= truth <= interval[1]


def accuracy_interval(n: int, lost: float, gained: float) -> Callable[[Rng, int], bool]:
    return lambda rng, seed: covers(
        statistics.paired_interval([paired(rng, n, lost, gained)], seed=seed), gained - lost
    )


def mean_interval(n: int) -> Callable[[Rng, int], bool]:
    """Skewed differences of log-likelihood: a shifted exponential with mean 0.1."""
    return lambda rng, seed: covers(statistics.mean_interval([rng.exponential(1.0, n) - 0.9], seed=seed), 0.1)


def pages(rng: Rng, n: int) -> np.ndarray:
    """Pages of very different length; the loss per word varies from page to page."""
    words = np.exp(rng.normal(7.0, 0.8, n)).round() + 20
    before = -words * (3.0 + 0.15 * rng.normal(size=n))
    after = before - words * (0.05 + 0.02 * rng.normal(size=n))
    return np.stack([np.stack([before, words], 1), np.stack([after, words], 1)], 1)


def true_nats() -> list[float]:
    """Nats per word before and after, over all pages that there are."""
    whole = pages(np.random.default_rng(99), 1_000_000)
    return [-whole[:, side, 0].sum() / whole[:, side, 1].sum() for side in (0, 1)]


def perplexity_interval(count: int) -> Callable[[Rng, int], bool]:
    before, after = true_nats()
    truth = float(np.exp(after) - np.exp(before))
    return lambda rng, seed: covers(compare_likelihoods("t", "perplexity", pages(rng, count), seed=seed).ci95, truth)


def ratio_interval(count: int) -> Callable[[Rng, int], bool]:
    """The interval of after / before - 1, which the verdict holds against its margin."""
    before, after = true_nats()
    truth = float(np.expm1(after - before))
    return lambda rng, seed: covers(
        compare_likelihoods("t", "perplexity", pages(rng, count), seed=seed).relative_ci95, truth
    )


def text_verdict(wanted: str, count: int) -> Callable[[Rng, int], bool]:
    """How often a perplexity that rises by just the margin gets the verdict `wanted`."""
    before, after = true_nats()
    margin = float(np.expm1(after - before))

    def run(rng: Rng, seed: int) -> bool:
        interval = compare_likelihoods("t", "perplexity", pages(rng, count), seed=seed).relative_ci95
        return statistics.rise_verdict(interval, margin) == wanted

    return run


def token_share(rows: int, tokens: int) -> Callable[[Rng, int], bool]:
    """Tokens at which two models agree, 80% in truth; rows differ (beta-binomial)."""

    def run(rng: Rng, _seed: int) -> bool:
        shares = rng.binomial(tokens, rng.beta(16, 4, size=rows)) / tokens
        return covers(statistics.clustered_share(shares, tokens), 0.8)

    return run


def verdict(wanted: str, tasks: list[int], loss: float, discordant: float = 0.2) -> Callable[[Rng, int], bool]:
    """How often the mean over tasks, each losing `loss` in truth, gets the verdict `wanted`."""

    def run(rng: Rng, seed: int) -> bool:
        groups = [paired(rng, n, (discordant + loss) / 2, (discordant - loss) / 2) for n in tasks]
        interval = statistics.paired_interval(groups, seed=seed)
        return statistics.verdict(interval, MARGIN) == wanted

    return run


def task_gate(tasks: list[int], loss: float) -> Callable[[Rng, int], bool]:
    """How often the gate blames at least one single task although each loses only `loss`."""

    def run(rng: Rng, _seed: int) -> bool:
        groups = [paired(rng, n, (0.2 + loss) / 2, (0.2 - loss) / 2) for n in tasks]
        return min(statistics.holm([statistics.p_inferior([group], MARGIN) for group in groups])) < LEVEL

    return run


PACK = [250] * 6
FULL = [10042, 1838, 1267, 500, 3270, 2376]
CHECKS = {
    "accuracy, 20 documents, 12% lost, 8% gained: 95% interval covers": (accuracy_interval(20, 0.12, 0.08), "95%"),
    "accuracy, 250 documents, 12% lost, 8% gained: covers": (accuracy_interval(250, 0.12, 0.08), "95%"),
    "accuracy, 250 documents, 1% lost, none gained: covers": (accuracy_interval(250, 0.01, 0.0), "95%"),
    "accuracy, 5000 documents, 5% lost, 4% gained: covers": (accuracy_interval(5000, 0.05, 0.04), "95%"),
    "log-likelihood, 5 skewed documents: covers": (mean_interval(5), "95%"),
    "log-likelihood, 250 skewed documents: covers": (mean_interval(250), "95%"),
    "perplexity, 4 pages: covers": (perplexity_interval(4), "95%"),
    "perplexity, 62 pages: covers": (perplexity_interval(62), "95%"),
    "perplexity as a share of the source's, 4 pages: covers": (ratio_interval(4), "95%"),
    "perplexity as a share of the source's, 62 pages: covers": (ratio_interval(62), "95%"),
    "perplexity, 62 pages, true rise at the margin: within_margin": (
        text_verdict("within_margin", 62), "at most 2.5%"),
    "perplexity, 62 pages, true rise at the margin: margin_broken": (
        text_verdict("margin_broken", 62), "at most 2.5%"),
    "share of tokens, 8 rows of 512 that differ: covers": (token_share(8, 512), "95%"),
    "mean over 6 x 250 rows, true loss at the margin: within_margin": (
        verdict("within_margin", PACK, MARGIN), "at most 2.5%"),
    "mean over 6 x 250 rows, true loss at the margin: margin_broken": (
        verdict("margin_broken", PACK, MARGIN), "at most 2.5%"),
    "mean over 6 full sets, true loss at the margin: within_margin": (
        verdict("within_margin", FULL, MARGIN), "at most 2.5%"),
    "mean over 6 full sets, true loss at the margin: margin_broken": (
        verdict("margin_broken", FULL, MARGIN), "at most 2.5%"),
    "some single task blamed, 6 x 250 rows, true loss at the margin": (task_gate(PACK, MARGIN), "at most 2.5%"),
    "some single task blamed, 6 full sets, true loss at the margin": (task_gate(FULL, MARGIN), "at most 2.5%"),
    "power: no true loss, 6 full sets: within_margin": (verdict("within_margin", FULL, 0.0), "the higher the better"),
    "power: no true loss, 6 x 250 rows: within_margin": (verdict("within_margin", PACK, 0.0), "the higher the better"),
    "power: true loss 5 points, 6 x 250 rows: margin_broken": (
        verdict("margin_broken", PACK, 0.05), "the higher the better"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    runs = parser.parse_args().runs
    print("| what happens | simulated | wanted |\n|---|--:|---|")
    for name, (check, wanted) in CHECKS.items():
        rng = np.random.default_rng(0)
        share = sum(check(rng, seed) for seed in range(runs)) / runs
        print(f"| {name} | {100 * share:.1f}% | {wanted} |", flush=True)


if __name__ == "__main__":
    main()
