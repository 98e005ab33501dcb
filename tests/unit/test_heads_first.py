"""Where KV heads can be pooled, that comes before sharing many layers."""

import re
from pathlib import Path
from typing import Any

import pytest

from cla_convert.conversion.auto import Choice
from cla_convert.conversion.heads_first import EVIDENCE, heads_first
from cla_convert.conversion.plan import make_plan
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.recipe_file import load_recipe
from tests.conftest import save_tiny_llama


@pytest.mark.parametrize(
    ("heads", "smaller", "count"),
    [
        (1, 3.0, None),
        (3, 2.5, 1),
        (3, 3.0, 1),
        (9, 3.0, 3),
        (8, 4.0, 2),
        (8, 3.0, None),
        (3, 4.0, None),
        (8, 1.3, None),
    ],
)
def test_heads_are_pooled_where_their_number_comes_near_to_the_aim(
    heads: int, smaller: float, count: int | None
) -> None:
    assert heads_first(heads, smaller) == count


@pytest.mark.parametrize(
    ("heads", "sharing", "kv_heads", "count"),
    [
        (3, "cla3", None, 1),
        (12, "cla3", None, 4),  # multi-head attention, too
        (6, "cla6", None, 1),
        (2, "cla3", None, None),  # half is not a third
        (3, "cla2", None, None),
        (3, "cla3", 1, None),
        (1, "cla3", None, None),
    ],
)
def test_a_plan_that_shares_many_layers_says_so_once(
    heads: int, sharing: Any, kv_heads: int | None, count: int | None, tmp_path: Path
) -> None:
    source = Checkpoint.open(
        save_tiny_llama(tmp_path / "m", hidden_size=48, num_attention_heads=12, num_key_value_heads=heads)
    )
    warnings = make_plan(source, sharing=sharing, init="mean", kv_heads=kv_heads).warnings
    told = [warning for warning in warnings if EVIDENCE in warning]
    assert len(told) == (count is not None)
    for warning in told:  # what it names is what `run` and `convert` take
        settings = re.findall(r"--set (\S+=\w+)", warning)
        convert = load_recipe(None, ["convert.init=mean", *settings], {"source.model": "m"}).recipe.convert
        assert (convert.kv_heads, convert.sharing, convert.init) == (count, "cla1", "calibrated")


def test_a_map_that_was_chosen_by_measurement_is_left_alone(tmp_path: Path) -> None:
    source = Checkpoint.open(
        save_tiny_llama(tmp_path / "m", hidden_size=48, num_attention_heads=12, num_key_value_heads=3)
    )
    for choice in (None, Choice(0.34, [], [])):
        plan = make_plan(source, sharing="cla3", init="mean", choice=choice)
        assert any(EVIDENCE in warning for warning in plan.warnings) == (choice is None)
