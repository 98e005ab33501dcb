"""The paired statistics against scipy, against closed forms, and by simulation of their coverage."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from cla_convert.errors import InputError
from cla_convert.evaluation import inference, stats


def task_file(values: list, metric: str = "acc", task: str = "piqa", **changes) -> dict:
    samples = [
        {"task": task, "doc_id": i, "doc_hash": f"d{i}", "prompt_hash": f"p{i}", "target_hash": "t"}
        | {"metrics": {metric: value}}
        for i, value in enumerate(values)
    ]
    return {"task": task, "samples": samples} | changes


def test_mcnemar_equals_scipy_and_the_closed_form():
    assert inference.mcnemar(0, 0) == 1.0
    assert inference.mcnemar(0, 5) == pytest.approx(2 * 0.5**5)
    assert inference.mcnemar(12, 3) == pytest.approx(scipy_stats.binomtest(3, 15).pvalue)


def test_sign_flip_is_exact_for_few_documents():
    differences = np.array([0.3, -0.1, 0.7, 0.2, 0.9, -0.4, 0.05])
    reference = scipy_stats.permutation_test(
        (differences, np.zeros(7)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    )
    assert inference.sign_flip(differences) == pytest.approx(reference.pvalue)


def test_sign_flip_agrees_with_the_t_test_on_many_normal_documents():
    differences = np.random.default_rng(5).normal(0.15, 1.0, size=200)
    reference = scipy_stats.ttest_1samp(differences, 0.0).pvalue
    assert inference.sign_flip(differences, seed=1) == pytest.approx(reference, abs=0.01)
    assert inference.sign_flip(differences, seed=1) == inference.sign_flip(differences, seed=1)


def test_sign_flip_is_uniform_under_no_difference():
    rng = np.random.default_rng(0)
    p = [inference.sign_flip(rng.normal(size=30), seed=i, resamples=400) for i in range(300)]
    assert np.mean(np.array(p) < 0.05) < 0.09
    assert 0.4 < np.mean(p) < 0.6


def test_bootstrap_equals_scipy():
    differences = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=250)
    reference = scipy_stats.bootstrap((differences,), np.mean, method="percentile", random_state=0).confidence_interval
    low, high = inference.bootstrap_interval(differences, seed=0)
    assert low == pytest.approx(reference.low, abs=0.006)
    assert high == pytest.approx(reference.high, abs=0.006)


def test_no_discordant_document_is_no_proof():
    low, high = inference.paired_interval(np.zeros(8))
    assert low < -0.2
    assert high > 0.2
    assert inference.bootstrap_interval(np.zeros(8)) == (0.0, 0.0)  # what the adjustment is for


@pytest.mark.parametrize("n", [20, 250])
def test_paired_interval_covers_the_truth(n: int):
    rng, probabilities = np.random.default_rng(n), [0.12, 0.80, 0.08]
    truth = probabilities[2] - probabilities[0]
    hits = 0
    for seed in range(200):
        low, high = inference.paired_interval(rng.choice([-1.0, 0.0, 1.0], p=probabilities, size=n), seed=seed)
        hits += low <= truth <= high
    assert hits / 200 >= 0.92


def test_pairing_is_much_sharper_than_two_standard_errors():
    rng = np.random.default_rng(0)
    before = (rng.random(500) < 0.5).astype(float)
    after = before.copy()
    after[:10] = 1 - after[:10]
    low, high = inference.paired_interval(after - before)
    unpaired = 1.96 * math.sqrt(2 * 0.25 / 500)
    assert (high - low) / 2 < unpaired / 3


def test_compare_counts_and_agrees_with_its_parts():
    before, after = [1.0, 1.0, 0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    (found,) = stats.compare(task_file(before), task_file(after), margin=0.01)
    assert (found.kind, found.n, found.lost, found.gained) == ("binary", 6, 3, 1)
    assert found.delta == pytest.approx(-2 / 6)
    assert found.p_value == pytest.approx(inference.mcnemar(3, 1))
    assert found.ci95[0] < found.delta < found.ci95[1]
    assert found.verdict == "not_enough_rows"


def test_perplexity_is_weighted_by_words_and_tested_by_document():
    before = [[-100.0, 50], [-300.0, 100], [-90.0, 30]]
    after = [[-110.0, 50], [-330.0, 100], [-99.0, 30]]
    (found,) = stats.compare(task_file(before, "word_perplexity"), task_file(after, "word_perplexity"))
    assert found.kind == "likelihood"
    assert found.before == pytest.approx(math.exp(490 / 180))
    assert found.after == pytest.approx(math.exp(539 / 180))
    assert found.delta == pytest.approx(found.after - found.before)
    assert (found.lost, found.gained) == (3, 0)
    assert found.p_value == pytest.approx(2 / 2**3)
    assert found.ci95[0] <= found.delta <= found.ci95[1]
    (bits,) = stats.compare(task_file(before, "bits_per_byte"), task_file(after, "bits_per_byte"))
    assert bits.before == pytest.approx(490 / 180 / math.log(2))


@pytest.mark.parametrize("key", ["prompt_hash", "doc_hash", "doc_id", "target_hash"])
def test_other_documents_or_prompts_are_refused(key: str):
    other = task_file([1.0, 0.0])
    other["samples"][1][key] = "another"
    with pytest.raises(InputError, match=key):
        stats.compare(task_file([1.0, 0.0]), other)


def test_other_tasks_and_other_counts_are_refused():
    with pytest.raises(InputError, match="boolq"):
        stats.compare(task_file([1.0]), task_file([1.0], task="boolq"))
    with pytest.raises(InputError, match="2 and 1 documents"):
        stats.compare(task_file([1.0, 0.0]), task_file([1.0]))


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((-0.005, 0.02), "within_margin"), ((-0.2, -0.05), "margin_broken"), ((-0.05, 0.03), "not_enough_rows"),
     ((-0.04, -0.001), "not_enough_rows"), ((0.01, 0.05), "within_margin")],
)  # fmt: skip
def test_verdict(interval: tuple[float, float], expected: str):
    assert inference.verdict(interval, margin=0.01) == expected


def test_macro_average_weighs_tasks_equally_and_narrows_with_more_of_them():
    rng = np.random.default_rng(0)
    comparisons = []
    for i, n in enumerate((50, 200, 100, 80)):
        before = (rng.random(n) < 0.5).astype(float)
        after = np.where(rng.random(n) < 0.1, 1 - before, before)
        comparisons += stats.compare(task_file(list(before), task=f"t{i}"), task_file(list(after), task=f"t{i}"))
    summary = stats.macro_average(comparisons, margin=0.01)
    assert summary is not None
    assert summary["delta"] == pytest.approx(np.mean([c.delta for c in comparisons]))
    assert summary["n"] == 430
    width = summary["ci95"][1] - summary["ci95"][0]
    assert width < min(c.ci95[1] - c.ci95[0] for c in comparisons)
    assert stats.macro_average([], margin=0.01) is None
