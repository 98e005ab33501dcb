"""Models in which some layers keep a state in place of keys and values: what is shared, counted, kept and refused."""

from pathlib import Path

import pytest
import torch

from cla_convert.bench.subject import cache_bytes, filled_cache, prefill
from cla_convert.conversion.attention_weights import AttentionWeights
from cla_convert.conversion.blocks import Factory
from cla_convert.conversion.convert import convert
from cla_convert.conversion.group_fit import Moments, fit_group
from cla_convert.conversion.initialisation import CalibrationText
from cla_convert.conversion.inspect import inspect_model, render
from cla_convert.conversion.plan import make_plan
from cla_convert.conversion.search import candidate_groups, choose_map
from cla_convert.conversion.sharing import groups_of, picture, sharing_map
from cla_convert.errors import InputError, UsageError
from cla_convert.evaluation.cache import kv_cache_of, live_layers
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import load_model
from cla_convert.models.families import FAMILIES
from cla_convert.models.shape import shape_of
from cla_convert.preflight import check_packing
from cla_convert.recipe import Recipe
from cla_convert.report.formats import groups_text, owners_text
from cla_convert.serving.sharing import check_attends
from tests.tiny import CASES, cla_model, save_tiny, source_model, tiny_config
from tests.unit.test_models import share

HYBRIDS = [case for case, (family, _) in CASES.items() if FAMILIES[family].state]
KINDS = ("conv", "full_attention", "conv", "full_attention", "full_attention", "conv", "full_attention")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {case: save_tiny(case, tmp_path_factory.mktemp(case)) for case in HYBRIDS}


def test_patterns_see_layers_with_attention_only():
    assert sharing_map("cla2", KINDS) == [None, 1, None, 1, 4, None, 4]
    assert sharing_map("cla2-keep-ends", KINDS) == [None, 1, None, 3, 3, None, 6]
    assert sharing_map("trailing:2", KINDS) == [None, 1, None, 3, 3, None, 3]
    assert sharing_map([[1, 3], [4], [6]], KINDS) == [None, 1, None, 1, 4, None, 6]
    assert sharing_map("[null, 1, null, 1, 4, null, 4]", KINDS) == [None, 1, None, 1, 4, None, 4]
    assert groups_of([None, 1, None, 1, 4, None, 4]) == [[1, 3], [4, 6]]
    assert picture([None, 1, None, 1, 4, None, 4]) == "[1 ← 3] [4 ← 6]"
    assert groups_text([None, 1, None, 1, 4, None, 4]) == "1 <- 3 | 4 <- 6"
    assert owners_text([None, 1, None, 1, 4, None, 4]) == "2 of 4 layers with attention"


@pytest.mark.parametrize("sharing", [[0, 1, 2, 1, 4, 5, 4], [None, 1, None, None, 4, None, 4], [[0, 1], [3, 4], [6]]])
def test_a_map_gives_no_keys_to_a_layer_without_attention_and_takes_none_away(sharing):
    with pytest.raises(UsageError, match=r"without attention|attention in layers \[1, 3, 4, 6\]"):
        sharing_map(sharing, KINDS)


def test_the_search_chooses_among_layers_with_attention():
    groups = candidate_groups(KINDS, 2)
    assert groups == [(1, 3), (3, 4), (4, 6)]
    costs = dict(zip(groups, (0.1, 1.0, 0.2), strict=True))
    assert choose_map(costs, KINDS, 2) == [None, 1, None, 1, 4, None, 4]
    with pytest.raises(InputError, match="only 1 of 4 layers"):
        choose_map(costs, KINDS, 1)


@pytest.mark.parametrize("case", HYBRIDS)
def test_keys_and_values_and_the_state_are_counted_apart(case: str):
    """Computed from config.json, and measured in transformers' cache."""
    shape = shape_of(tiny_config(case).to_dict())
    maps = [None, share(case, "cla2-keep-ends")]
    for sources, model in zip(maps, (source_model(case), cla_model(case, maps[1])), strict=True):
        owners = len(groups_of(sources)) if sources else len(shape.kv_layers)
        found = kv_cache_of(model, 16)
        assert found["bytes_per_token"] == shape.kv_bytes_per_token(4, owners) and found["cached_layers"] == owners
        assert found["state_bytes"] == shape.state_bytes(4) > 0
    with torch.inference_mode():
        half = prefill(cla_model(case, maps[1]).bfloat16(), 1, 16)
    assert sum(layer.state_bytes for layer in live_layers(half)) == shape.state_bytes(2)


@pytest.mark.parametrize("case", HYBRIDS)
def test_a_cache_made_for_a_batch_holds_its_states_and_goes_on(case: str):
    model = cla_model(case, share(case, "cla2"))
    cache = filled_cache(model, 3, 20)
    with torch.inference_mode():
        assert cache_bytes(cache) == cache_bytes(prefill(model, 3, 20))
        assert model(torch.zeros(3, 1, dtype=torch.long), past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("case", HYBRIDS)
def test_inspect_and_plan_tell_what_is_not_shared(case: str, sources):
    found = inspect_model(str(sources[case]))
    shape = shape_of(tiny_config(case).to_dict())
    assert found["supported"] and found["state_bytes"] == shape.state_bytes(4)
    assert found["kv_bytes_per_token"] == shape.kv_bytes_per_token(4, len(shape.kv_layers))
    assert found["patterns"]["cla2-keep-ends"]["kv_layers"] == len(groups_of(share(case, "cla2-keep-ends")))
    assert "which stay as they are" in render(found)
    plan = make_plan(Checkpoint.open(sources[case]), sharing="cla2-keep-ends", init="mean")
    assert f"of {len(shape.kv_layers)} layers with attention own" in plan.render()
    assert plan.to_json()["state_bytes"] == shape.state_bytes(4)
    assert (
        make_plan(Checkpoint.open(sources[case]), sharing="cla1", init="mean").warnings[-1].startswith("no layer sha")
    )


@pytest.mark.parametrize("case", HYBRIDS)
def test_conversion_by_calibration_leaves_other_layers_byte_for_byte(case: str, sources, tmp_path: Path):
    """Matching included; what was planned as kept is kept, everything else of the attention is fitted."""
    source, family = Checkpoint.open(sources[case]), FAMILIES[CASES[case][0]]
    tokens = torch.randint(2, 258, (6, 32), generator=torch.Generator().manual_seed(1))
    plan = make_plan(source, sharing="cla2-keep-ends", init="calibrated", calibration_tokens=tokens.numel())
    convert(plan, source, tmp_path / "out", calibration=CalibrationText(tokens, "digest", "cpu", steps=2))
    found = Checkpoint.open(tmp_path / "out")
    places = {name: family.place(name) for name in found.tensors}
    kept = [name for name, place in places.items() if place is None or not place.module]
    assert kept and all(torch.equal(found.read(name), source.read(name)) for name in kept)
    changed = {place.layer for name, place in places.items() if place and place.module == family.o_proj
               and not torch.equal(found.read(name), source.read(name))}  # fmt: skip
    first = next(group[0] for group in plan.groups if len(group) > 1)
    assert changed == {layer for layer in plan.shape.kv_layers if layer >= first}
    with torch.inference_mode():
        assert load_model(tmp_path / "out")(tokens).logits.isfinite().all()


@pytest.mark.parametrize("case", [case for case in HYBRIDS if FAMILIES[CASES[case][0]].gated])
def test_sizes_of_values_pass_their_gates(case: str, sources, tmp_path: Path):
    """A consumer whose values are the owner's in other sizes, its heads swapped, is found again by the closed form."""
    tokens = torch.randint(2, 258, (8, 32), generator=torch.Generator().manual_seed(1))
    checkpoint = Checkpoint.open(sources[case])
    factory = Factory(checkpoint, checkpoint.config, tokens, "cpu", torch.float32)
    shape, weights = factory.head_shape(1), factory.read_layer(1, mlp=False)
    own = AttentionWeights.of(factory.build(1, weights), weights).projections
    sizes = torch.linspace(0.5, 2, len(own.v)).double()
    swapped = lambda rows: rows.unflatten(0, (shape.kv_heads, -1)).flip(0).flatten(0, 1)  # noqa: E731
    other = type(own)(swapped(own.q), swapped(own.k), swapped(own.v * sizes[:, None]), swapped(own.o.T).T)
    second = torch.eye(own.v.shape[1]).double()
    moments = Moments(second, torch.zeros(len(second)).double(), [second] * 2, [second] * 2)
    closed = fit_group(shape, [own, other], moments, strength=1e-9)
    assert closed.captured_v == pytest.approx(1) and closed.permutations[1] == (1, 0)
    for member, place in ((0, own), (1, other)):
        found = closed.members[member]
        ratio = swapped(found.o.T).T / place.o if member else found.o / place.o
        assert (ratio.std(0) < 1e-6 * ratio.mean(0).abs()).all()  # a column of W_O only changes its size


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"train": {"tokens": 4096, "document_masking": True}}, "train.document_masking"),
        ({"train": {"tokens": 4096}, "data": {"sources": [{"generate": {}}]}}, r"data.sources\[0\].generate"),
    ],
)
def test_several_texts_in_a_row_are_refused(settings: dict, named: str):
    recipe = Recipe.model_validate({"source": {"model": "some"}, **settings})
    with pytest.raises(InputError, match=f"{named} does not work with models of type 'lfm2'"):
        check_packing(recipe, tiny_config("lfm2").to_dict())
    check_packing(recipe, tiny_config("llama").to_dict())


def test_vllm_is_not_asked_to_serve_one():
    with pytest.raises(InputError, match="2 of its 4 layers have no attention"):
        check_attends([None, 1, None, 1])
    check_attends([0, 0, 2])


def test_gates_go_with_their_heads(sources):
    """Into the order of the shared KV heads; in their own order nothing changes."""
    tokens = torch.randint(2, 258, (2, 16), generator=torch.Generator().manual_seed(1))
    checkpoint = Checkpoint.open(sources["qwen3_5"])
    factory = Factory(checkpoint, checkpoint.config, tokens, "cpu", torch.float32)
    weights = factory.read_layer(1, mlp=False)
    block, stored = factory.build(1, weights), weights["self_attn.q_proj.weight"]
    attention = AttentionWeights.of(block, weights)
    same, swapped = (attention.tensors(block, weights, order)["self_attn.q_proj.weight"] for order in ((0, 1), (1, 0)))
    assert torch.equal(same, stored)
    heads, moved = (rows.unflatten(0, (4, 2, 16)) for rows in (stored, swapped))
    assert torch.equal(moved[:, 0], heads[:, 0])  # the caller has moved the queries themselves
    assert torch.equal(moved[:, 1], heads[[2, 3, 0, 1], 1])
