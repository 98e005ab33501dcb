"""The paired statistics against scipy, against closed forms, and by simulation of their coverage."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from cla_convert.errors import InputError
from cla_convert.evaluation import paired, statistics


def task_file(values: list, metric: str = "acc", task: str = "piqa", **changes) -> dict:
    samples = [
        {"task": task, "doc_id": i, "doc_hash": f"d{i}", "prompt_hash": f"p{i}", "target_hash": "t"}
        | {"metrics": {metric: value}}
        for i, value in enumerate(values)
    ]
    return {"task": task, "samples": samples} | changes


def test_mcnemar_equals_statsmodels_and_the_closed_form():
    assert statistics.mcnemar(0, 0) == 1.0
    assert statistics.mcnemar(0, 5) == pytest.approx(2 * 0.5**5)
    for lost, gained in [(12, 3), (3, 12), (40, 41), (1, 1), (9, 0)]:
        reference = mcnemar([[100, lost], [gained, 50]], exact=True).pvalue
        assert statistics.mcnemar(lost, gained) == pytest.approx(reference)


def test_holm_equals_statsmodels():
    assert statistics.holm([]) == []
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 30):
        p = list(rng.random(n) ** 3)
        assert statistics.holm(p) == pytest.approx(list(multipletests(p, method="holm")[1]))
    assert statistics.holm([0.02, 0.02]) == [0.04, 0.04]


def test_student_interval_equals_scipy():
    values = np.random.default_rng(4).normal(0.3, 2.0, size=9)
    reference = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert statistics.student(values, float(values.mean())) == pytest.approx((reference.low, reference.high))


def test_wilson_equals_statsmodels_and_stays_in_bounds():
    for right, n in [(0, 8), (8, 8), (1, 12), (61.7, 100), (250, 251)]:
        reference = proportion_confint(right, n, method="wilson")
        assert statistics.wilson(right / n, n) == pytest.approx(reference, abs=1e-12)
    assert statistics.wilson(1.0, 5)[1] == 1.0 and statistics.wilson(0.0, 5)[0] == 0.0


def test_a_share_of_tokens_counts_rows_where_tokens_of_a_row_are_alike():
    rng = np.random.default_rng(0)
    alike = np.repeat([0.0, 1.0, 1.0, 1.0], 2)  # rows that are all wrong or all right: 8 trials, not 800
    low, high = statistics.clustered_share(alike, 100)
    assert 0 < low < 0.5 and 0.9 < high < 1
    independent = rng.binomial(100, 0.75, size=200) / 100
    plain = statistics.wilson(float(independent.mean()), 20_000)
    assert statistics.clustered_share(independent, 100) == pytest.approx(plain, abs=0.002)
    nearly = np.array([0.99, 1.0, 0.94, 1.0])  # Student's interval would end at 1.03
    assert statistics.student(nearly, float(nearly.mean()))[1] > 1
    low, high = statistics.clustered_share(nearly, 256)
    assert low < nearly.mean() < high <= 1
    assert statistics.clustered_share(nearly[:1], 256) is None


def test_a_clustered_share_covers_the_truth():
    rng, hits = np.random.default_rng(3), 0
    for _ in range(400):  # rows differ: beta-binomial, 12 rows of 64 tokens, mean 0.8
        found = statistics.clustered_share(rng.binomial(64, rng.beta(16, 4, size=12)) / 64, 64)
        hits += found[0] <= 0.8 <= found[1]
    assert 0.92 <= hits / 400 <= 0.985


def test_what_cannot_be_negative_has_no_negative_interval():
    values = np.array([0.0, 0.01, 0.3])
    assert statistics.mean_interval([values])[0] < 0
    assert statistics.positive_interval(values) == (0.0, statistics.mean_interval([values])[1])
    many = np.random.default_rng(0).normal(5, 1, 50)
    assert statistics.positive_interval(many) == statistics.mean_interval([many])


def test_few_documents_get_an_interval_that_is_wide_enough():
    values = np.array([0.1, 0.2, 0.3])
    low, high = statistics.mean_interval([values])
    assert (low, high) == pytest.approx(statistics.student(values, 0.2))
    narrow = statistics.bootstrap_interval([values])
    assert low < narrow[0] and high > narrow[1]
    assert statistics.mean_interval([values[:1]]) is None


def test_p_inferior_agrees_with_its_interval():
    """Below 2.5% exactly when the adjusted Wald interval lies below the margin."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        differences = rng.choice([-1.0, 0.0, 1.0], p=[0.12, 0.83, 0.05], size=300)
        below = statistics.wald([differences])[1] < -0.02
        assert (statistics.p_inferior([differences], 0.02) < 0.025) == below
        seen.add(below)
    assert seen == {True, False}


def test_verdicts_at_the_margin_err_in_at_most_a_fortieth_of_the_cases():
    """True loss equal to the margin: neither verdict may come more often than 2.5% (plus simulation noise)."""
    rng = np.random.default_rng(1)
    verdicts = []
    for seed in range(400):
        groups = [rng.choice([-1.0, 0.0, 1.0], p=[0.11, 0.80, 0.09], size=n) for n in (800, 2000, 500)]
        verdicts.append(statistics.verdict(statistics.paired_interval(groups, seed=seed), margin=0.02))
    for wrong in ("within_margin", "margin_broken"):
        assert verdicts.count(wrong) / 400 < 0.045
    assert verdicts.count("within_margin") + verdicts.count("margin_broken") > 0  # it is not just silent


def test_bootstrap_of_counts_is_the_bootstrap_of_documents(monkeypatch: pytest.MonkeyPatch):
    differences = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=250)
    by_count = statistics.bootstrap_interval([differences], seed=0)
    by_document = statistics.percentiles(statistics.resample(lambda i: differences[i].mean(axis=1), 250, seed=0))
    assert by_count == pytest.approx(by_document, abs=0.006)


def test_sign_flip_is_exact_for_few_documents():
    differences = np.array([0.3, -0.1, 0.7, 0.2, 0.9, -0.4, 0.05])
    reference = scipy_stats.permutation_test(
        (differences, np.zeros(7)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    )
    assert statistics.sign_flip(differences) == pytest.approx(reference.pvalue)


def test_sign_flip_agrees_with_the_t_test_on_many_normal_documents():
    differences = np.random.default_rng(5).normal(0.15, 1.0, size=200)
    reference = scipy_stats.ttest_1samp(differences, 0.0).pvalue
    assert statistics.sign_flip(differences, seed=1) == pytest.approx(reference, abs=0.01)
    assert statistics.sign_flip(differences, seed=1) == statistics.sign_flip(differences, seed=1)


def test_sign_flip_is_uniform_under_no_difference():
    rng = np.random.default_rng(0)
    p = [statistics.sign_flip(rng.normal(size=30), seed=i, resamples=400) for i in range(300)]
    assert np.mean(np.array(p) < 0.05) < 0.09
    assert 0.4 < np.mean(p) < 0.6


def test_bootstrap_equals_scipy():
    differences = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=250)
    reference = scipy_stats.bootstrap((differences,), np.mean, method="percentile", random_state=0).confidence_interval
    low, high = statistics.bootstrap_interval([differences], seed=0)
    assert low == pytest.approx(reference.low, abs=0.006)
    assert high == pytest.approx(reference.high, abs=0.006)


def test_no_discordant_document_is_no_proof():
    low, high = statistics.paired_interval([np.zeros(8)])
    assert low < -0.2
    assert high > 0.2
    assert statistics.bootstrap_interval([np.zeros(8)]) == (0.0, 0.0)  # what the adjustment is for


def test_an_interval_is_of_what_weighs():
    rng = np.random.default_rng(0)
    sure, unsure = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=200), rng.choice([-1.0, 1.0], size=10)
    for interval in (statistics.bootstrap_interval, statistics.paired_interval):
        assert interval([sure, unsure], weights=[1.0, 0.0]) == pytest.approx(interval([sure]))
        low, high = interval([sure, unsure], weights=[0.5, 0.5])
        assert (low, high) == pytest.approx(interval([sure, unsure]))
        assert high - low > 1.5 * np.ptp(interval([sure]))


@pytest.mark.parametrize("n", [20, 250])
def test_paired_interval_covers_the_truth(n: int):
    rng, probabilities = np.random.default_rng(n), [0.12, 0.80, 0.08]
    truth = probabilities[2] - probabilities[0]
    hits = 0
    for seed in range(200):
        low, high = statistics.paired_interval([rng.choice([-1.0, 0.0, 1.0], p=probabilities, size=n)], seed=seed)
        hits += low <= truth <= high
    assert hits / 200 >= 0.92


def test_pairing_is_much_sharper_than_two_standard_errors():
    rng = np.random.default_rng(0)
    before = (rng.random(500) < 0.5).astype(float)
    after = before.copy()
    after[:10] = 1 - after[:10]
    low, high = statistics.paired_interval([after - before])
    unpaired = 1.96 * math.sqrt(2 * 0.25 / 500)
    assert (high - low) / 2 < unpaired / 3


def test_compare_counts_and_agrees_with_its_parts():
    before, after = [1.0, 1.0, 0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    (found,) = paired.compare(task_file(before), task_file(after), margin=0.01)
    assert (found.kind, found.n, found.lost, found.gained) == ("binary", 6, 3, 1)
    assert found.delta == pytest.approx(-2 / 6)
    assert found.p_value == pytest.approx(statistics.mcnemar(3, 1))
    assert found.ci95[0] < found.delta < found.ci95[1]
    assert found.verdict == "inconclusive"


def test_perplexity_is_weighted_by_words_and_tested_by_document():
    before = [[-100.0, 50], [-300.0, 100], [-90.0, 30]]
    after = [[-110.0, 50], [-330.0, 100], [-99.0, 30]]
    (found,) = paired.compare(task_file(before, "word_perplexity"), task_file(after, "word_perplexity"))
    assert found.kind == "likelihood"
    assert found.before == pytest.approx(math.exp(490 / 180))
    assert found.after == pytest.approx(math.exp(539 / 180))
    assert found.delta == pytest.approx(found.after - found.before)
    assert (found.lost, found.gained) == (3, 0)
    assert found.p_value == pytest.approx(2 / 2**3)
    assert found.ci95[0] <= found.delta <= found.ci95[1]
    (bits,) = paired.compare(task_file(before, "bits_per_byte"), task_file(after, "bits_per_byte"))
    assert bits.before == pytest.approx(490 / 180 / math.log(2))


def test_one_page_gives_no_interval_and_three_pages_a_wide_one():
    (one,) = paired.compare(task_file([[-100.0, 50]], "word_perplexity"), task_file([[-110.0, 50]], "word_perplexity"))
    assert one.ci95 is None and one.as_dict()["ci95"] is None
    before, after = [[-100.0, 50], [-300.0, 100], [-90.0, 30]], [[-111.0, 50], [-330.0, 100], [-98.0, 30]]
    (found,) = paired.compare(task_file(before, "word_perplexity"), task_file(after, "word_perplexity"))
    assert found.ci95 is not None
    pairs = np.array([before, after]).swapaxes(0, 1)
    draws = [np.exp(-p[:, 1, 0].sum() / p[:, 1, 1].sum()) - np.exp(-p[:, 0, 0].sum() / p[:, 0, 1].sum())
             for p in (pairs[list(i)] for i in itertools.product(range(3), repeat=3))]  # fmt: skip
    assert found.ci95[0] < min(draws) and found.ci95[1] > max(draws)  # beyond all that a bootstrap can draw


def test_the_linearised_interval_agrees_with_the_bootstrap_on_many_pages():
    rng = np.random.default_rng(0)
    words = rng.integers(50, 2000, 400).astype(float)
    before = -words * rng.normal(3.0, 0.2, 400)
    after = before - words * rng.normal(0.05, 0.05, 400)
    pairs = np.stack([np.stack([before, words], 1), np.stack([after, words], 1)], 1)
    low, high = paired.compare_likelihoods("t", "perplexity", pairs).ci95
    delta = paired.compare_likelihoods("t", "perplexity", pairs).delta
    linear = statistics.student(paired._influence(pairs, "perplexity"), delta)
    assert (low, high) == pytest.approx(linear, rel=0.08)
    relative = paired.compare_likelihoods("t", "perplexity", pairs).relative_ci95
    start = paired.compare_likelihoods("t", "perplexity", pairs).before
    assert relative == pytest.approx((low / start, high / start), rel=0.1)


def test_the_perplexity_of_single_answers_is_lm_evals():
    before, after = [-0.5, -3.0, -1.0], [-0.7, -3.5, -0.9]
    (found,) = paired.compare(task_file(before, "perplexity"), task_file(after, "perplexity"))
    assert found.kind == "likelihood"
    assert (found.before, found.after) == pytest.approx((math.exp(1.5), math.exp(1.7)))


def test_of_a_group_what_it_aggregates_is_compared():
    """A metric that one of its tasks has alone would be preferred, and judged for all of them."""
    group = task_file([1.0, 0.0], "acc") | {"subtasks": {"one": {}, "two": {}}, "scores": {"acc": 0.5}}
    group["samples"][1]["metrics"]["acc_norm"] = 1.0
    assert [found.metric for found in paired.compare(group, group)] == ["acc"]


def group_file(tasks: dict[str, list[float]], score: float, **settings) -> dict:
    """A group's file: its documents are those of its tasks."""
    file = task_file([value for values in tasks.values() for value in values])
    names = [name for name, values in tasks.items() for _ in values]
    for sample, name in zip(file["samples"], names, strict=True):
        sample["task"] = name
    return file | {"subtasks": {name: {} for name in tasks}, "scores": {"acc": score}} | settings


LONG_AND_SHORT = (
    {"long": [1.0] * 60 + [0.0] * 40, "short": [1.0] * 9 + [0.0]},
    {"long": [1.0] * 70 + [0.0] * 30, "short": [1.0] * 5 + [0.0] * 5},
)


@pytest.mark.parametrize("said", [{"equal_weights": ["acc"]}, {}])
def test_a_group_whose_tasks_weigh_the_same_is_compared_so(said: dict):
    """Over pooled documents it would have gained where its score has lost; older files do not say how it is weighed."""
    scores = [np.mean([np.mean(values) for values in tasks.values()]) for tasks in LONG_AND_SHORT]
    files = [group_file(tasks, score, **said) for tasks, score in zip(LONG_AND_SHORT, scores, strict=True)]
    (found,) = paired.compare(*files)
    assert (found.before, found.after, found.delta) == pytest.approx((*scores, scores[1] - scores[0]))
    assert found.delta < 0 < found.gained - found.lost
    low, high = found.ci95
    assert low < found.delta < high
    short = statistics.paired_interval([found.strata[1]])
    assert high - low < short[1] - short[0]  # half of it is known much better
    assert found.p_value == pytest.approx(
        statistics.sign_flip(np.array([0.0] * 90 + [0.55] * 10 + [-5.5] * 4)), abs=0.02
    )
    alone = paired.macro_average([found], margin=0.01)
    assert alone is not None
    assert alone["ci95"] == found.ci95
    (other,) = paired.compare(task_file([1.0, 0.0] * 20), task_file([1.0, 1.0] * 20))
    both = paired.macro_average([found, other], margin=0.01)  # a half of each, however many tasks it has
    assert both is not None
    assert both["delta"] == pytest.approx((found.delta + other.delta) / 2)
    weights = [1 / 4, 1 / 4, 1 / 2]
    assert both["ci95"] == statistics.paired_interval([*found.strata, *other.strata], weights=weights)


def test_a_group_by_size_is_compared_over_its_documents():
    scores = [np.mean([value for values in tasks.values() for value in values]) for tasks in LONG_AND_SHORT]
    files = [group_file(tasks, score) for tasks, score in zip(LONG_AND_SHORT, scores, strict=True)]
    for more in ({}, {"equal_weights": []}):
        (found,) = paired.compare(*(file | more for file in files))
        assert found.delta == pytest.approx(scores[1] - scores[0])
        assert len(found.strata) == 1


def test_a_score_that_does_not_come_of_its_documents_has_no_interval():
    """A group's mean of perplexities, or a median: what is tested would not be what is shown."""
    files = [task_file([-1.0, -2.0], "perplexity") | {"scores": {"perplexity": score}} for score in (5.0, 6.0)]
    (found,) = paired.compare(*files)
    assert (found.kind, found.before, found.delta, found.ci95) == ("corpus", 5.0, 1.0, None)
    files = [task_file([0.0, 0.0, 1.0]) | {"scores": {"acc": score}} for score in (0.0, 0.5)]
    assert [(one.delta, one.ci95) for one in paired.compare(*files)] == [(0.5, None)]


def test_a_mean_over_strata_covers_its_truth():
    """Numbers of two tasks, one long and one short with more spread; nothing is known where one has a single row."""
    rng, inside = np.random.default_rng(0), 0
    for seed in range(200):
        groups = [rng.normal(0.1, 1, 80), rng.normal(0.3, 3, 12)]
        low, high = statistics.mean_interval(groups, seed=seed)
        inside += low < 0.2 < high
    assert 182 <= inside <= 199
    assert statistics.mean_interval([groups[0], groups[1][:1]]) is None
    bootstrap = statistics.bootstrap_interval(groups[:1], seed=3)
    student = statistics.student(groups[0], float(groups[0].mean()))  # what Welch's degrees of freedom are of one group
    wider = min(bootstrap[0], student[0]), max(bootstrap[1], student[1])
    assert statistics.mean_interval(groups[:1], seed=3) == pytest.approx(wider)


@pytest.mark.parametrize("metric", ["error", "error,first-line"])
def test_a_metric_where_less_is_better_gets_no_verdict(metric: str):
    """Whatever filter its answers came through."""
    left, right = (task_file(values, metric, higher_is_better={"error": False}) for values in ([1.0, 0.0], [0.0, 0.0]))
    (found,) = paired.compare(left, right)
    assert found.verdict == ""
    assert (found.lost, found.gained) == (0, 1)
    assert paired.macro_average([found], margin=0.01) is None


@pytest.mark.parametrize("key", ["prompt_hash", "doc_hash", "doc_id", "target_hash"])
def test_other_documents_or_prompts_are_refused(key: str):
    other = task_file([1.0, 0.0])
    other["samples"][1][key] = "another"
    with pytest.raises(InputError, match=key):
        paired.compare(task_file([1.0, 0.0]), other)


def test_other_tasks_and_other_counts_are_refused():
    with pytest.raises(InputError, match="boolq"):
        paired.compare(task_file([1.0]), task_file([1.0], task="boolq"))
    with pytest.raises(InputError, match="2 and 1 documents"):
        paired.compare(task_file([1.0, 0.0]), task_file([1.0]))


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((-0.005, 0.02), "within_margin"), ((-0.2, -0.05), "margin_broken"), ((-0.05, 0.03), "inconclusive"),
     ((-0.04, -0.001), "inconclusive"), ((0.01, 0.05), "within_margin")],
)  # fmt: skip
def test_verdict(interval: tuple[float, float], expected: str):
    assert statistics.verdict(interval, margin=0.01) == expected


def test_macro_average_weighs_tasks_equally_and_narrows_with_more_of_them():
    rng = np.random.default_rng(0)
    comparisons = []
    for i, n in enumerate((50, 200, 100, 80)):
        before = (rng.random(n) < 0.5).astype(float)
        after = np.where(rng.random(n) < 0.1, 1 - before, before)
        comparisons += paired.compare(task_file(list(before), task=f"t{i}"), task_file(list(after), task=f"t{i}"))
    summary = paired.macro_average(comparisons, margin=0.01)
    assert summary is not None
    assert summary["delta"] == pytest.approx(np.mean([c.delta for c in comparisons]))
    assert summary["n"] == 430
    both = group_file({"a": [1.0] * 40, "b": [0.0] * 10}, 0.5, equal_weights=["acc"], task="group")
    with_group = paired.macro_average([*comparisons, *paired.compare(both, both)], margin=0.01)
    assert with_group is not None
    assert with_group["delta"] == pytest.approx(0.8 * summary["delta"])
    assert sum(with_group["ci95"]) / 2 == pytest.approx(0.8 * sum(summary["ci95"]) / 2, abs=0.01)
    width = summary["ci95"][1] - summary["ci95"][0]
    assert width < min(c.ci95[1] - c.ci95[0] for c in comparisons)
    assert paired.macro_average([], margin=0.01) is None


@pytest.mark.parametrize(
    ("metric", "before", "after"),
    [
        ("mcc", [[0, 1], [1, 1], [0, 0]], [[0, 0], [1, 1], [0, 0]]),
        ("f1", [[0, 1], [1, 1], [0, 0]], [[0, 0], [1, 1], [0, 0]]),
        ("brier_score", [[0, [0.5, 0.5]], [1, [0.2, 0.8]]], [[0, [0.4, 0.6]], [1, [0.2, 0.8]]]),
        ("bleu", [["a cat", "a dog"], ["b", "b"]], [["a cat", "cat"], ["b", "c"]]),
    ],
)
def test_a_metric_of_all_documents_at_once_is_not_taken_for_one_of_each(metric: str, before: list, after: list):
    """What lm-eval keeps of a document: the answer and what it should be, in pairs as log-likelihoods and counts."""
    files = [task_file(side, metric, scores={metric: value}) for side, value in ((before, 0.5), (after, 0.4))]
    (found,) = paired.compare(*files)
    assert (found.kind, found.before, found.after, found.verdict) == ("corpus", 0.5, 0.4, "")
    assert found.delta == pytest.approx(-0.1) and found.ci95 is None and found.p_value is None


def test_what_is_no_number_is_not_left_out_and_shows_nothing():
    """JSON's null stands for it."""
    (found,) = paired.compare(task_file([-1.0, -2.0], "likelihood_of"), task_file([-1.0, None], "likelihood_of"))
    assert math.isnan(found.delta) and found.p_value is None and found.verdict == "" and found.ci95 is None
    (found,) = paired.compare(task_file([-1.0, -2.0], "perplexity"), task_file([-1.0, None], "perplexity"))
    assert found.before == pytest.approx(math.exp(1.5)) and math.isnan(found.after)
    assert found.p_value is found.ci95 is found.relative_ci95 is None


def test_documents_that_a_task_leaves_out_say_nothing():
    (found,) = paired.compare(task_file([1.0, None, 0.0]), task_file([1.0, None, 1.0]))
    assert (found.n, found.kind, found.delta) == (2, "binary", 0.5)
