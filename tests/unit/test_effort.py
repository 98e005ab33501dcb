"""How much calibration a model gets by default, and how many steps: docs/how-it-works.md states these numbers."""

import pytest

from cla_convert.effort import Effort, affordable_length, affordable_tokens


@pytest.mark.parametrize(
    ("device", "parameters", "tokens", "steps"),
    [
        ("cpu", 135e6, 40_960, 36),
        ("cpu", 1e3, 40_960, 36),  # however small
        ("cpu", 8e9, 24_576, 20),
        ("cuda", 135e6, 2_592_592, 368),
        ("cuda:1", 1e3, 2_600_000, 369),
        ("cuda", 8e9, 65_536, 60),
    ],
)
def test_tokens_and_steps(device: str, parameters: float, tokens: int, steps: int) -> None:
    assert affordable_tokens(int(parameters), device) == tokens
    assert Effort.for_text(tokens, device).steps == steps


def test_less_text_than_the_least_gets_the_least_steps() -> None:
    assert Effort.for_text(100, "cpu").steps == 20 and Effort.for_text(100, "cuda").steps == 60


def test_rows_are_shorter_where_attention_is_slow() -> None:
    assert (affordable_length("cpu"), affordable_length("cuda")) == (512, 1024)


@pytest.mark.parametrize(("gigabytes", "tokens"), [(80, 2_592_592), (24, 946_969), (1, 65_536)])
def test_calibration_text_fits_a_small_gpu(gigabytes: int, tokens: int) -> None:
    assert affordable_tokens(135_000_000, "cuda:0", width=576, memory=gigabytes * 10**9) == tokens
    assert affordable_tokens(135_000_000, "cpu", width=576, memory=None) == 40_960
