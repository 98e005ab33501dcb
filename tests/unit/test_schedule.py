import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cla_convert.recipe import Train
from cla_convert.training.schedule import Budget, crossed, learning_rate
from cla_convert.training.trainer import text_seen

SETTINGS = dict(peak=1.0, warmup=0.1, final=0.1)


def curve(schedule: str, steps: int = 1000, **overrides: float) -> list[float]:
    settings = SETTINGS | overrides
    return [learning_rate(i, i + 1, steps, schedule=schedule, **settings) for i in range(steps)]  # type: ignore[arg-type]


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    rates = curve("constant")
    assert rates[0] == pytest.approx(0.005) and rates[49] == pytest.approx(0.495)
    assert rates[100:] == [1.0] * 900


def test_cosine_falls_from_the_peak_to_the_final_share() -> None:
    rates = curve("cosine")
    assert rates[100] == pytest.approx(1.0, abs=1e-4) and rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert rates[549] == pytest.approx(0.55, abs=2e-3)  # half-way between 1 and 0.1
    assert all(a > b for a, b in itertools.pairwise(rates[100:]))


def test_wsd_is_constant_then_decays_by_one_minus_sqrt() -> None:
    rates = curve("wsd")
    assert rates[100:800] == [1.0] * 700
    assert rates[850] == pytest.approx(1 - math.sqrt(50.5 / 200))
    assert 0 < rates[-1] < 0.01


def test_no_warm_up_and_a_single_step() -> None:
    assert learning_rate(0, 10, 10, schedule="cosine", peak=2.0, warmup=0.0, final=0.0) == pytest.approx(1.0)


@given(tokens=st.integers(512, 100_000), rows=st.integers(1, 100), length=st.integers(8, 512), micro=st.integers(1, 8))
def test_the_budget_is_met_in_whole_sequences_and_never_exceeded(
    tokens: int, rows: int, length: int, micro: int
) -> None:
    train = Train(tokens=tokens, batch_tokens=rows * length, sequence_length=length, micro_batch_size=micro)
    budget = Budget.of(train)
    assert tokens - length < budget.tokens <= tokens
    ranges = [budget.step_range(step) for step in range(budget.steps)]
    assert [i for first, end in ranges for i in range(first, end)] == list(range(budget.sequences))
    assert all(0 < end - first <= rows for first, end in ranges)
    assert budget.tokens_after(budget.steps) == budget.tokens


def test_intervals() -> None:
    assert crossed(10, 9, 10) and crossed(10, 5, 25) and not crossed(10, 10, 19)
    assert not crossed(0, 0, 100)


def test_passes_are_over_what_was_prepared() -> None:
    """A tenth of the text is prepared for a small budget: 0.12 passes over that are not over the text."""
    assert text_seen(sequences=32, prepared=256, length=256) == "0.12 passes over the 65.5k tokens prepared of the text"
    assert text_seen(sequences=256, prepared=256, length=256) == "1 pass over the 65.5k tokens prepared of the text"
