"""Fewer KV heads: exact where heads are equal up to a change of basis, alone and together with layers that share."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cla_convert.conversion.auto import choose
from cla_convert.conversion.candidates import measure_maps
from cla_convert.conversion.convert import convert
from cla_convert.conversion.head_matching import group_heads, match_heads
from cla_convert.conversion.initialisation import CalibrationText
from cla_convert.conversion.kv_heads import check_kv_heads
from cla_convert.conversion.plan import make_plan
from cla_convert.conversion.search import candidate_groups, choose_map
from cla_convert.conversion.sensitivity import Search, measure_sensitivity
from cla_convert.effort import Effort
from cla_convert.errors import InputError, UsageError
from cla_convert.evaluation.cache import measure_kv_cache
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import load_model
from cla_convert.models.families import FAMILIES
from cla_convert.models.shape import shape_of
from cla_convert.models.verify import verify_models
from cla_convert.report.model_card import described, write_model_card
from tests.conftest import byte_tokenizer
from tests.tiny import save_tiny, source_model
from tests.unit.test_calibration import divergence, logits, plant

TOKENS = torch.randint(2, 258, (16, 32), generator=torch.Generator().manual_seed(1))
GROUPS = [[0, 2], [1, 3]]
"""Heads that are planted as equal: no neighbours, so that they have to be found."""
Sharing = str | list[int] | list[list[int]]
ROUNDING = {"llama": 1e-5, "llama-biases": 1e-5, "qwen3": 1e-5, "phi3-partial": 1e-5, "smollm3": 1e-5, "mixtral": 1e-5,
            "olmo2": 1e-3}  # fmt: skip
"""Of the largest logit. OLMo 2: behind a norm the refit of W_O leaves out its epsilon."""


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without bfloat16, so that what is exact can be told from what is not."""
    monkeypatch.setattr("cla_convert.conversion.blocks.has_native_bfloat16", lambda _: False)


def plant_heads(model: PreTrainedModel, groups: list[list[int]]) -> None:
    """Make the KV heads of each group the first of them in other bases, in every layer.

    Keys: any complex scalar for each frequency; a rotation behind a norm, whose two gains of a pair must agree. Values:
    any map. Queries and outputs stay random: whatever they were, they read a multiple of one head now.
    """
    dim = model.config.head_dim
    rotary = int(dim * model.config.rope_parameters.get("partial_rotary_factor", 1))
    half = rotary // 2
    for layer in model.model.layers:
        normed = even_gains(layer.self_attn, dim)
        for keys, values in keys_and_values(layer.self_attn, dim):
            for first, *others in groups:
                for head in others:
                    generator = torch.Generator().manual_seed(head)
                    scale = torch.randn(half, 1, dtype=torch.complex64, generator=generator)
                    turned = torch.complex(*keys[first, :rotary].view(2, half, -1)) * (
                        scale / scale.abs() if normed else scale
                    )
                    keys[head] = torch.cat([turned.real, turned.imag, 2 * keys[first, rotary:]])
                    values[head] = torch.randn(dim, dim, generator=generator) @ values[first]


def even_gains(attention: Any, dim: int) -> bool:
    """Give both channels of a rotary pair, and all heads, the same gain; whether there are norms."""
    norms = [module for name, module in attention.named_children() if name.endswith("_norm")]
    for norm in norms:
        gains = norm.weight.data.view(-1, 2, dim // 2)
        gains[:] = gains[:1, :1].clone()
    return bool(norms)


def keys_and_values(attention: Any, dim: int) -> list[tuple[Tensor, Tensor]]:
    """Views [heads, dim, inputs] of both, of weights and of biases, of a fused projection too."""
    if fused := getattr(attention, "qkv_proj", None):
        rows = attention.config.num_key_value_heads * dim
        pairs = [fused.weight.data[-2 * rows :].chunk(2)]
    else:
        pairs = [
            (key.data, value.data)
            for key, value in zip(attention.k_proj.parameters(), attention.v_proj.parameters(), strict=True)
        ]
    return [tuple(part.view(-1, dim, part[0].numel()) for part in pair) for pair in pairs]  # type: ignore[misc]


def save(model: PreTrainedModel, folder: Path) -> Checkpoint:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return Checkpoint.open(folder)


def converted(
    source: Checkpoint,
    out: Path,
    steps: int = 0,
    *,
    kv_heads: int | None,
    sharing: Sharing = "cla1",
    init: str = "calibrated",
) -> Path:
    plan = make_plan(source, sharing=sharing, init=init, kv_heads=kv_heads)
    convert(plan, source, out, calibration=CalibrationText(TOKENS, "random", "cpu", 0, steps))
    return out


def assert_same(model: PreTrainedModel, folder: Path, rounding: float = 1e-5) -> None:
    wanted = logits(model, TOKENS)
    atol = rounding * wanted.abs().max().item()
    torch.testing.assert_close(logits(load_model(folder), TOKENS), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("case", ROUNDING)
def test_heads_that_are_the_same_up_to_a_change_of_basis_become_one(case: str, tmp_path: Path) -> None:
    model = source_model(case, num_key_value_heads=4)
    plant_heads(model, GROUPS)
    folder = converted(save(model, tmp_path / "source"), tmp_path / "out", kv_heads=2)
    assert_same(model, folder, ROUNDING[case])
    manifest = json.loads((folder / "cla_manifest.json").read_text())["kv_heads"]
    assert (manifest["before"], manifest["after"]) == (4, 2)
    assert all(sorted(map(sorted, groups)) == GROUPS for groups in manifest["groups"].values())


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_layers_share_in_the_same_step(case: str, tmp_path: Path) -> None:
    model = source_model(case, num_key_value_heads=4)
    plant_heads(model, GROUPS)
    plant(model, member=2, owner=1)
    source = save(model, tmp_path / "source")
    folder = converted(source, tmp_path / "out", kv_heads=2, sharing=[[0], [1, 2], [3], [4], [5]])
    assert_same(model, folder)
    keys = Checkpoint.open(folder).tensors["model.layers.1.self_attn.k_proj.weight"]
    assert keys.shape == (2 * 8, 32) and "model.layers.2.self_attn.k_proj.weight" not in Checkpoint.open(folder).tensors


def test_steps_stay_near_what_is_exact(tmp_path: Path) -> None:
    model = source_model("llama", num_key_value_heads=4)
    plant_heads(model, GROUPS)
    source = save(model, tmp_path / "source")
    fitted = load_model(converted(source, tmp_path / "fitted", 20, kv_heads=2))
    mean = load_model(converted(source, tmp_path / "mean", init="mean", kv_heads=2))
    assert divergence(model, fitted, TOKENS) < 1e-3 * divergence(model, mean, TOKENS)


@pytest.mark.parametrize("init", ["mean", "first"])
@pytest.mark.parametrize("case", ["llama-biases", "qwen3", "olmo2", "phi3-partial"])
def test_equal_neighbours_pool_without_loss(case: str, init: str, tmp_path: Path) -> None:
    model = source_model(case, num_key_value_heads=4)
    for layer in model.model.layers:
        even_gains(layer.self_attn, model.config.head_dim)
        for keys, values in keys_and_values(layer.self_attn, model.config.head_dim):
            keys[1::2], values[1::2] = keys[::2].clone(), values[::2].clone()
    assert_same(model, converted(save(model, tmp_path / "source"), tmp_path / "out", init=init, kv_heads=2))


def test_mean_is_over_neighbours_and_layers_and_first_is_the_first_of_them(tmp_path: Path) -> None:
    source = save(source_model("llama", num_key_value_heads=4), tmp_path / "source")
    keys = [source.read(f"model.layers.{layer}.self_attn.k_proj.weight").view(2, 2, 8, 32) for layer in (1, 2)]
    for init, wanted in (("mean", torch.stack(keys).mean((0, 2))), ("first", keys[0][:, 0])):
        out = Checkpoint.open(converted(source, tmp_path / init, init=init, kv_heads=2, sharing="cla2-keep-ends"))
        torch.testing.assert_close(out.read("model.layers.1.self_attn.k_proj.weight"), wanted.flatten(0, 1))
        query = "model.layers.1.self_attn.q_proj.weight"
        assert torch.equal(out.read(query), source.read(query))
        assert json.loads((out.folder / "cla_manifest.json").read_text())["kv_heads"]["groups"]["1"] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("case", "has", "init", "sharing"),
    [("llama", 2, "calibrated", "cla2"), ("llama", 2, "mean", "cla1"), ("gpt_bigcode", 1, "calibrated", "cla1")],
)
def test_as_many_heads_as_before_change_no_byte(case: str, has: int, init: str, sharing: str, tmp_path: Path) -> None:
    """Nor is the number added to a config.json that leaves it out."""
    config = save(source_model(case), tmp_path / "source").config
    if case == "gpt_bigcode":
        del config["num_key_value_heads"]
        (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    source = Checkpoint.open(tmp_path / "source")
    plain, named = (
        converted(source, tmp_path / str(heads), 1, init=init, sharing=sharing, kv_heads=heads) for heads in (None, has)
    )
    assert ("num_key_value_heads" in Checkpoint.open(plain).config) == (case == "llama")
    assert [file.name for file in sorted(plain.iterdir())] == [file.name for file in sorted(named.iterdir())]
    assert all(file.read_bytes() == (named / file.name).read_bytes() for file in plain.iterdir())


def test_outputs_work_without_this_package_and_cache_what_was_planned(tmp_path: Path) -> None:
    """Multi-head attention to multi-query, half the heads, a fused projection; alone and with layers that share."""
    cases = {
        "llama": (4, 1, "cla1"),
        "phi3": (2, 1, "cla2"),
        "gemma3": (4, 2, "cla2-keep-ends"),
    }
    folders = {}
    for case, (heads, kv_heads, sharing) in cases.items():
        source = Checkpoint.open(save_tiny(case, tmp_path / case / "source", num_key_value_heads=heads))
        folders[case] = converted(source, tmp_path / case / "out", 1, kv_heads=kv_heads, sharing=sharing)
        plan = make_plan(source, sharing=sharing, init="calibrated", kv_heads=kv_heads)
        stored = Checkpoint.open(folders[case])
        before, after = plan.kv_bytes_per_token["before"], plan.kv_bytes_per_token["after"]
        assert before * len(plan.groups) * kv_heads == after * 6 * heads
        assert shape_of(stored.config).num_key_value_heads == kv_heads
        assert plan.parameters["after"] == sum(info.numel for info in stored.tensors.values())
    measured = measure_kv_cache(folders["llama"], device="cpu")["bytes_per_token"]
    assert measured * 4 == measure_kv_cache(tmp_path / "llama" / "source", device="cpu")["bytes_per_token"]
    assert all(result["ok"] for result in verify_models(list(folders.values())))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "said"),
    [(4, 3, "4 KV heads cannot become 3"), (4, 8, "Give one of 1, 2,"), (1, 2, "nothing to pool")],
)
def test_numbers_that_do_not_divide_are_refused(heads: int, kv_heads: int, said: str, tmp_path: Path) -> None:
    source = save(source_model("llama", num_key_value_heads=heads), tmp_path / "source")
    with pytest.raises(UsageError) as refused:
        make_plan(source, sharing="cla1", init="mean", kv_heads=kv_heads)
    assert said in str(refused.value) + str(refused.value.fix)


def test_families_without_such_a_number_are_refused() -> None:
    shape = replace(shape_of(source_model("llama").config.to_dict()), num_key_value_heads=4)
    with pytest.raises(InputError, match="as many KV heads as query heads"):
        check_kv_heads(2, FAMILIES["gpt_bigcode"], shape)


def test_what_an_output_says_of_itself_counts_both(tmp_path: Path) -> None:
    """The card of an uptrained model is made from its folder alone."""
    source = save(source_model("llama", num_key_value_heads=4), tmp_path / "source")
    report = described(converted(source, tmp_path / "out", init="mean", kv_heads=1, sharing="cla2"))
    assert report["kv"] == {
        "bytes_per_token_before": 6 * 2 * 4 * 8 * 4, "bytes_per_token_after": 3 * 2 * 8 * 4, "long_context": None,
    }  # fmt: skip
    card = write_model_card(tmp_path / "out", report).read_text()
    assert "3 of 6 layers compute" in card and "with 1 KV head a layer instead of 4" in card and "8.00x" in card


def pairs_that_keep(scores: np.ndarray) -> Callable[[Tensor], Tensor]:
    return lambda pairs: torch.from_numpy(scores)[pairs[:, 0], pairs[:, 1]]


@pytest.mark.parametrize(("heads", "each"), [(6, 2), (6, 3), (8, 4), (12, 3)])
def test_heads_that_belong_together_are_found_in_every_layer(heads: int, each: int) -> None:
    generator = np.random.default_rng(0)
    kinds = np.concatenate([generator.permutation(np.arange(heads) % (heads // each)) for _ in range(3)])
    scores = np.where(kinds[:, None] == kinds, 2, generator.random((3 * heads, 3 * heads)))
    np.fill_diagonal(scores, 0)
    orders = match_heads(pairs_that_keep(scores), 3, heads, heads // each)
    found = [kinds[b * heads + np.array(order)].reshape(-1, each) for b, order in enumerate(orders)]
    assert all((rows == found[0][:, :1]).all() for rows in found) and len(set(found[0][:, 0])) == heads // each
    assert all(sorted(order) == list(range(heads)) for order in orders)


def test_no_swap_of_two_heads_would_keep_more() -> None:
    scores = np.random.default_rng(1).random((9, 9))
    scores = np.triu(scores, 1) + np.triu(scores, 1).T
    groups = group_heads(scores, 3)
    kept = lambda groups: sum(scores[np.ix_(group, group)].sum() for group in groups)  # noqa: E731
    places = [(g, i) for g in range(3) for i in range(3)]
    for (a, i), (b, j) in ((one, other) for one in places for other in places if one[0] < other[0]):
        swapped = [list(group) for group in groups]
        swapped[a][i], swapped[b][j] = groups[b][j], groups[a][i]
        assert kept(swapped) <= kept(groups) + 1e-9


def test_a_map_is_measured_with_the_heads_it_will_have(tmp_path: Path) -> None:
    """Layers that pool their heads cost something alone: here nothing but for layer 3, whose heads differ."""
    model = source_model("llama", num_key_value_heads=4)
    attention = model.model.layers[3].self_attn
    kept = {name: tensor.clone() for name, tensor in attention.state_dict().items()}
    plant_heads(model, GROUPS)
    attention.load_state_dict(kept)
    source = save(model, tmp_path / "source")
    search = Search(largest=2, probe_rows=3, effort=Effort(0, 64), fit_tokens=9 * 32)
    table = measure_sensitivity(source, source.config, ["full"] * 6, TOKENS, search=search, kv_heads=2)
    assert [entry.layers for entry in table] == candidate_groups(["full"] * 6, 2, 1)
    costs = {entry.layers: entry.kl for entry in table}
    alone = [costs[layer,] for layer in range(6)]
    assert max(alone[:3] + alone[4:]) < 1e-4 * alone[3]
    assert choose_map({(0,): 5.0, (1,): 5.0, (0, 1): 1.0}, ["full"] * 2, 2) == [0, 0]
    (whole,) = measure_maps(source, source.config, [[*range(6)]], TOKENS, search=search, kv_heads=2)
    assert whole.kl == pytest.approx(alone[3], rel=0.5)  # the walk refits what is behind it, too


@pytest.mark.parametrize(("budget", "owners"), [(0.5, 6), (0.25, 3), (None, 3)])
def test_the_budget_counts_heads_too(budget: float | None, owners: int, tmp_path: Path, cache: Path) -> None:
    source = save(source_model("llama", num_key_value_heads=4), tmp_path / "source")
    shape, text = shape_of(source.config), CalibrationText(TOKENS, "random", "cpu", 0)
    choice = choose(source, shape, 2, budget, text, cache / "heads")
    plan = make_plan(source, sharing=choice.kv_source_layers, init="calibrated", kv_heads=2, choice=choice)
    assert len(plan.groups) <= owners
    assert plan.kv_bytes_per_token["after"] <= (budget or 0.25) * plan.kv_bytes_per_token["before"]
    assert "sensitivity" in plan.render()
