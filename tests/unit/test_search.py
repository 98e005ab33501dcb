"""The choice of the map is exact, and the damage table ranks what is free below what is not."""

from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from cla_convert.conversion.calibration import calibrated_pooling
from cla_convert.conversion.candidates import measure_maps
from cla_convert.conversion.search import candidate_groups, choose_map, likely_maps, owners_for
from cla_convert.conversion.sensitivity import Search, measure_sensitivity
from cla_convert.effort import Effort
from cla_convert.errors import InputError
from cla_convert.models.classes import cla_classes
from cla_convert.models.families import family_of
from tests.conftest import tiny_llama_config


def cost_of(sources: list[int], costs: dict[tuple[int, ...], float]) -> float:
    groups = [tuple(i for i, owner in enumerate(sources) if owner == o) for o in set(sources)]
    return sum(costs.get(group, float("inf")) for group in groups if len(group) > 1)


@settings(max_examples=200)
@given(
    kinds=st.lists(st.sampled_from("ab"), min_size=2, max_size=6),
    owners=st.integers(1, 6),
    seed=st.integers(0, 100),
)
def test_no_map_within_the_budget_is_cheaper(kinds: list[str], owners: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = {group: torch.rand(1, generator=generator).item() for group in candidate_groups(kinds, 3)}
    every = [list(sources) for sources in product(*(range(i + 1) for i in range(len(kinds))))]
    every = [s for s in every if all(s[o] == o for o in s) and within(s, kinds, owners)]
    cheapest = min((cost_of(s, costs) for s in every), default=float("inf"))
    if cheapest == float("inf"):
        with pytest.raises(InputError, match="No sharing map"):
            choose_map(costs, kinds, owners)
    else:
        chosen = choose_map(costs, kinds, owners)
        assert cost_of(chosen, costs) == pytest.approx(cheapest) and within(chosen, kinds, owners)


def within(sources: list[int], kinds: list[str], owners: int) -> bool:
    """At most so many owners, and of every kind at most its share of them, rounded up."""
    shares = {kind: -(-owners * kinds.count(kind) // len(kinds)) for kind in kinds}
    owned = [kinds[owner] for owner in set(sources)]
    return len(owned) <= owners and all(owned.count(kind) <= share for kind, share in shares.items())


def test_full_layers_share_too_where_sliding_ones_would_do() -> None:
    """Six layers, of which the third and the last are full: no budget of a half keeps both of those to themselves."""
    kinds = ["sliding", "sliding", "full"] * 2
    costs = {group: 1.0 if kinds[group[0]] == "full" else 0.01 for group in candidate_groups(kinds, 4)}
    assert choose_map(costs, kinds, 3)[5] == 2


def test_groups_are_neighbours_within_their_kind() -> None:
    assert candidate_groups("aabab", 2) == [(0, 1), (1, 3), (2, 4)]


def test_likely_maps_keep_to_the_budget_and_hold_the_cheapest_and_the_patterns() -> None:
    kinds = ["full"] * 8
    costs = {group: 1.0 / len(group) for group in candidate_groups(kinds, 4)}  # large groups look best
    maps = likely_maps(costs, kinds, 4)
    assert maps[0] == choose_map(costs, kinds, 4)
    assert [0, 0, 2, 2, 4, 4, 6, 6] in maps and [0, 1, 1, 1, 4, 4, 4, 7] in maps
    assert all(len(set(sources)) <= 4 for sources in maps)
    assert len(maps) == len(set(map(tuple, maps)))


def test_the_budget_is_never_exceeded() -> None:
    assert [owners_for(share, 30) for share in (0.75, 0.66, 0.5, 0.4, 1.0)] == [22, 19, 15, 12, 30]
    with pytest.raises(InputError, match="share of the KV cache"):
        owners_for(1.5, 30)


class Planted:
    """A model whose layers 2 and 3 see the same input and project it alike: they share at no cost."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_llama_config()).eval()
        layers = model.model.layers
        layers[2].self_attn.o_proj.weight.data.zero_()
        layers[2].mlp.down_proj.weight.data.zero_()
        for name in ("k_proj", "v_proj"):
            getattr(layers[3].self_attn, name).weight.data = getattr(layers[2].self_attn, name).weight.data.clone()
        self.config, self.tensors = model.config.to_dict(), model.state_dict()

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        return self.tensors[name][rows]


TOKENS = torch.randint(2, 258, (12, 32), generator=torch.Generator().manual_seed(0))
SEARCH = Search(largest=3, probe_rows=3, effort=Effort(0, 64), fit_tokens=9 * 32)


def test_a_group_that_loses_nothing_ranks_lowest_wherever_streams_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Planted()
    table = measure_sensitivity(model, model.config, ["full"] * 6, TOKENS, search=SEARCH)
    monkeypatch.setattr("cla_convert.conversion.streams.available_memory", lambda: 0)
    assert table == measure_sensitivity(model, model.config, ["full"] * 6, TOKENS, search=SEARCH, spill=tmp_path)
    assert [entry.layers for entry in table] == candidate_groups(["full"] * 6, 3)
    costs = {entry.layers: entry.kl for entry in table}
    assert min(costs, key=lambda group: costs[group]) == (2, 3)
    assert costs[2, 3] < 0.01 * sorted(costs.values())[1]
    assert choose_map(costs, ["full"] * 6, 5) == [0, 1, 2, 2, 4, 5]


def test_whole_maps_are_measured_as_they_would_be_converted() -> None:
    model = Planted()
    maps = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 2, 4, 5], [0, 0, 2, 2, 4, 4]]
    unchanged, free, costly = measure_maps(model, model.config, maps, TOKENS, search=SEARCH, dtype=torch.float32)
    assert [entry.layers for entry in (unchanged, free, costly)] == [tuple(sources) for sources in maps]
    assert unchanged.kl == unchanged.delta_nll == 0
    assert abs(free.kl) < 0.01 * costly.kl
    assert costly.kl == pytest.approx(converted_kl(model, maps[2]), rel=1e-3)


def converted_kl(model: Planted, sources: list[int]) -> float:
    """KL on the probe rows, from the logits of the two whole models."""
    source = LlamaForCausalLM(tiny_llama_config()).eval()
    source.load_state_dict(model.tensors)
    classes = cla_classes(family_of(model.config))
    config = classes["Config"](**{k: v for k, v in model.config.items() if k != "model_type"}, kv_source_layers=sources)
    student = classes["ForCausalLM"](config).eval()
    fit, probe = SEARCH.split(TOKENS)
    state = dict(model.tensors)
    effort = SEARCH.effort
    for patch in calibrated_pooling(model, model.config, sources, fit, effort=effort, dtype=torch.float32):
        state |= patch.tensors
    student.load_state_dict({name: state[name] for name in student.state_dict()})
    with torch.no_grad():
        wanted, found = (m(probe).logits[:, :-1].log_softmax(-1) for m in (source, student))
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()
