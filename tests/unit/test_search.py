"""The choice of the map is exact, and the damage table ranks what is free below what is not."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from cla_convert.conversion.damage import Search, measure_damage
from cla_convert.conversion.matching import Effort
from cla_convert.conversion.search import candidate_groups, choose_map, owners_for
from cla_convert.errors import InputError
from tests.conftest import tiny_llama_config


def cost_of(sources: list[int], costs: dict[tuple[int, ...], float]) -> float:
    groups = [tuple(i for i, owner in enumerate(sources) if owner == o) for o in set(sources)]
    return sum(costs.get(group, float("inf")) for group in groups if len(group) > 1)


@settings(deadline=None, max_examples=50)
@given(
    kinds=st.lists(st.sampled_from("ab"), min_size=2, max_size=6),
    owners=st.integers(1, 6),
    seed=st.integers(0, 100),
)
def test_no_map_within_the_budget_is_cheaper(kinds: list[str], owners: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = {group: torch.rand(1, generator=generator).item() for group in candidate_groups(kinds, 3)}
    every = [list(sources) for sources in product(*(range(i + 1) for i in range(len(kinds))))]
    every = [s for s in every if all(s[o] == o for o in s) and len(set(s)) <= owners]
    cheapest = min((cost_of(s, costs) for s in every), default=float("inf"))
    if cheapest == float("inf"):
        with pytest.raises(InputError, match="No sharing map"):
            choose_map(costs, kinds, owners)
    else:
        chosen = choose_map(costs, kinds, owners)
        assert cost_of(chosen, costs) == pytest.approx(cheapest) and len(set(chosen)) <= owners


def test_groups_are_neighbours_within_their_kind() -> None:
    assert candidate_groups("aabab", 2) == [(0, 1), (1, 3), (2, 4)]


def test_the_budget_is_never_exceeded() -> None:
    assert [owners_for(share, 30) for share in (0.75, 0.66, 0.5, 0.4, 1.0)] == [22, 19, 15, 12, 30]
    with pytest.raises(InputError, match="share of the KV cache"):
        owners_for(1.5, 30)


def test_a_group_that_loses_nothing_ranks_lowest() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config()).eval()
    layers = model.model.layers
    layers[2].self_attn.o_proj.weight.data.zero_()  # layers 2 and 3 see the same input and project it alike
    layers[2].mlp.down_proj.weight.data.zero_()
    for name in ("k_proj", "v_proj"):
        getattr(layers[3].self_attn, name).weight.data = getattr(layers[2].self_attn, name).weight.data.clone()

    class Memory:
        config = model.config.to_dict()
        tensors = model.state_dict()

        def read(self, name: str) -> torch.Tensor:
            return self.tensors[name]

    tokens = torch.randint(2, 258, (12, 32))
    search = Search(largest=3, probe_rows=3, effort=Effort(0, 64), fit_tokens=9 * 32)
    table = measure_damage(Memory(), Memory.config, ["full"] * 6, tokens, search=search)
    assert [entry.layers for entry in table] == candidate_groups(["full"] * 6, 3)
    costs = {entry.layers: entry.kl for entry in table}
    assert min(costs, key=lambda group: costs[group]) == (2, 3)
    assert costs[2, 3] < 0.01 * sorted(costs.values())[1]
    assert choose_map(costs, ["full"] * 6, 5) == [0, 1, 2, 2, 4, 5]
