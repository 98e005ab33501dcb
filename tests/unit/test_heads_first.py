"""Where KV heads can be pooled, that comes before sharing many layers."""

from pathlib import Path
from typing import Any

import pytest

from cla_convert.conversion.heads_first import EVIDENCE, heads_first
from cla_convert.conversion.plan import make_plan
from cla_convert.models.checkpoint import Checkpoint
from tests.conftest import save_tiny_llama


@pytest.mark.parametrize(
    ("heads", "smaller", "settings"),
    [
        (1, 3.0, None),
        (3, 2.5, {"kv_heads": 1, "sharing": "cla1"}),
        (3, 3.0, {"kv_heads": 1, "sharing": "cla1"}),
        (9, 3.0, {"kv_heads": 3, "sharing": "cla1"}),
        (8, 4.0, {"kv_heads": 2, "sharing": "cla1"}),
        (8, 3.0, {"kv_heads": 4, "sharing": "auto", "kv_budget": 0.33}),  # halved, which is not enough
        (3, 4.0, {"kv_heads": 1, "sharing": "auto", "kv_budget": 0.25}),
        (5, 3.0, None),  # a fifth is too little, and there is nothing between
        (8, 1.3, None),
    ],
)
def test_heads_are_pooled_as_far_as_their_number_and_the_aim_allow(
    heads: int, smaller: float, settings: dict[str, Any] | None
) -> None:
    assert heads_first(heads, smaller) == settings


@pytest.mark.parametrize(
    ("heads", "sharing", "kv_heads", "options"),
    [
        (2, "cla3", None, "--kv-heads 1 --sharing auto --kv-budget 0.33"),
        (4, "cla6", None, "--kv-heads 1 --sharing auto --kv-budget 0.17"),  # multi-head attention, too
        (4, [[0, 1, 2, 3], [4], [5]], None, ""),
        (2, "cla2", None, ""),
        (2, "cla3", 1, ""),
        (1, "cla3", None, ""),
    ],
)
def test_a_plan_that_shares_many_layers_says_so_once(
    heads: int, sharing: Any, kv_heads: int | None, options: str, tmp_path: Path
) -> None:
    source = Checkpoint.open(save_tiny_llama(tmp_path / "m", num_key_value_heads=heads))
    warnings = make_plan(source, sharing=sharing, init="mean", kv_heads=kv_heads).warnings
    told = [warning for warning in warnings if "--kv-heads" in warning and "multi-head" not in warning]
    assert [f"try {options}, which saves about as much: {EVIDENCE}"] * bool(options) == told
    assert sum("--kv-heads" in warning for warning in warnings) == (1 if options or heads == 4 else 0)
