"""Sharing patterns against their definitions, and refusals by name of layer."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cla_convert.conversion.plan import make_plan
from cla_convert.conversion.sharing import groups_of, picture, sharing_map, validate_map
from cla_convert.errors import UsageError
from cla_convert.models.checkpoint import Checkpoint


def owners(name: str, layers: int) -> list[int]:
    return sorted(set(sharing_map(name, ["full"] * layers)))


def test_patterns_of_the_paper():
    assert owners("cla3", 10) == [0, 1, 4, 7]  # the remainder goes first
    assert owners("cla2", 20) == list(range(0, 20, 2))
    assert owners("cla2-keep-ends", 20) == [0, *range(1, 19, 2), 19]
    assert owners("cla3-keep-ends", 10) == [0, 1, 3, 6, 9]
    assert owners("dense-front:11", 20) == [*range(10), 19]
    assert owners("dense-back:11", 20) == [0, 1, *range(11, 20)]
    assert owners("trailing:5", 8) == [0, 1, 2]
    assert sharing_map("dense-front:11", ["full"] * 20)[10:19] == [9] * 9
    assert sharing_map("dense-back:11", ["full"] * 20)[2:11] == [1] * 9
    assert owners("dense-front", 20) == owners("dense-front:11", 20)
    assert owners("dense-back", 20) == owners("dense-back:11", 20)
    assert sharing_map("cla1", ["full"] * 4) == [0, 1, 2, 3]


def test_groups_and_owners_by_hand():
    assert sharing_map([[0], [1, 2], [3]], ["full"] * 4) == [0, 1, 1, 3]
    assert sharing_map("[[0],[1,2],[3]]", ["full"] * 4) == [0, 1, 1, 3]
    assert sharing_map([0, 0, 2, 2], ["full"] * 4) == [0, 0, 2, 2]
    assert groups_of([0, 1, 1, 3, 1]) == [[0], [1, 2, 4], [3]]


def test_adjacent_means_adjacent_within_the_kind():
    kinds = ["full" if i % 6 == 5 else "sliding" for i in range(18)]
    assert groups_of(sharing_map("cla2", kinds))[:6] == [[0], [1, 2], [3, 4], [5], [6, 7], [8, 9]]
    keep = groups_of(sharing_map("cla2-keep-ends", kinds))
    assert [0] in keep and [17] in keep and [5, 11] in keep
    trailing = sharing_map("trailing:6", kinds)
    assert trailing[12:] == [10] * 5 + [11]


@pytest.mark.parametrize(
    ("sharing", "message"),
    [
        ([0, 2, 2, 3], "Layer 1 cannot read layer 2"),  # the consumer precedes its owner
        ([0, 0, 1, 3], "Layer 2 cannot read layer 1"),  # the source does not own
        ([0, 1, 0, 3], "different kinds"),
        ([0, 1, 2], "3 entries"),
        ([0, 1, 2, 9], "no such layer"),
        ([[0], [1, 2]], "exactly once"),
        ("cla", "Did you mean"),
        ("trailing", "number of trailing"),
        ("dense-front:2", "between 3 and 4"),
        ("[[0],[1,2]", "not a list of groups"),
    ],
)
def test_refusals_name_the_layer(sharing, message):
    with pytest.raises(UsageError, match=message) as caught:
        sharing_map(sharing, ["full", "full", "sliding", "sliding"])
    assert str(caught.value)


@given(st.integers(1, 40), st.integers(1, 4), st.booleans(), st.integers(0, 5))
def test_grouped_patterns_are_valid_for_any_shape(layers, k, keep_ends, period):
    kinds = ["full" if period and i % period == 0 else "sliding" for i in range(layers)]
    sources = sharing_map(f"cla{k}" + ("-keep-ends" if keep_ends else ""), kinds)
    validate_map(sources, kinds)
    assert max(map(len, groups_of(sources))) <= k
    if keep_ends:
        assert sources[0] == 0 and sources[-1] == layers - 1
        assert sources.count(0) == 1


def test_picture_shows_every_layer():
    text = picture(sharing_map("cla2-keep-ends", ["full"] * 8))
    assert text == "[0] [1 ← 2] [3 ← 4] [5 ← 6] [7]"


def test_groups_larger_than_the_model_are_refused():
    assert sharing_map("cla8", ["full"] * 8) == [0] * 8
    for name in ("cla99", "cla9", "cla7-keep-ends"):
        with pytest.raises(UsageError, match="more than there is to share"):
            sharing_map(name, ["full"] * 8)


def test_a_plan_says_what_of_its_memory_the_text_takes(tiny_llama: Path):
    """Two streams a layer of the widest group, and five, of 32 channels in float32."""
    source = Checkpoint.open(tiny_llama)
    without = make_plan(source, sharing="cla2", init="calibrated")
    plan = make_plan(source, sharing="cla2", init="calibrated", calibration_tokens=2**20)
    assert plan.activation_bytes == plan.memory_bytes - without.memory_bytes == (2 * 2 + 5) * 2**20 * 32 * 4
    assert "of it 1.1 GiB for activations of the text\n" in f"{plan.render()}\n"
    assert "of the text, or in its place 576.0 MiB in the GPU" in plan.render("mine", "cuda")
    assert plan.render("mine").startswith("source      mine (llama, 6 layers")
    blind = make_plan(source, sharing="cla2", init="mean", calibration_tokens=2**20)
    assert blind.activation_bytes == without.activation_bytes == 0 and "activations" not in blind.render()
