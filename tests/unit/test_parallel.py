"""How a step's sequences, and parameters, are divided among processes; and who goes first."""

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from cla_convert.errors import UsageError
from cla_convert.training.layout import shards_of
from cla_convert.training.parallel import Team, share
from tests.tiny import cla_model

counts = st.integers(1, 70)


@given(first=st.integers(0, 1000), count=counts, micro_batch=st.integers(1, 9), size=st.integers(1, 9))
def test_every_sequence_is_taken_once_in_as_many_passes(first: int, count: int, micro_batch: int, size: int) -> None:
    shares = [share(first, first + count, micro_batch, rank, size) for rank in range(size)]
    assert [index for passes in shares for part in passes for index in part] == list(range(first, first + count))
    assert len({len(passes) for passes in shares}) == 1
    assert all(len(part) <= micro_batch for passes in shares for part in passes)
    amounts = [sum(map(len, passes)) for passes in shares]
    assert max(amounts) - min(amounts) <= 1
    assert any(passes[-1] for passes in shares)  # no pass is for nothing everywhere


@given(count=counts, micro_batch=st.integers(1, 9))
def test_one_process_takes_micro_batch_after_micro_batch(count: int, micro_batch: int) -> None:
    starts = range(7, 7 + count, micro_batch)
    assert share(7, 7 + count, micro_batch, 0, 1) == [range(s, min(s + micro_batch, 7 + count)) for s in starts]


@pytest.mark.parametrize(
    ("degree", "processes", "here", "shards"),
    [("all", 16, 8, 16), ("node", 16, 8, 8), ("node", 4, 4, 4), (2, 16, 8, 2), (1, 3, 3, 1)],
)
def test_shard_degree(degree: int | Literal["all", "node"], processes: int, here: int, shards: int) -> None:
    assert shards_of(degree, processes, here) == shards
    members = [Team(rank=rank, size=processes, shards=shards) for rank in range(processes)]
    assert [one.part for one in members if one.saves] == list(range(shards))
    assert [one.replicated for one in members] == [shards < processes] * processes


def test_a_degree_that_does_not_divide_the_processes_is_refused() -> None:
    with pytest.raises(UsageError, match="groups of 3"):
        shards_of(3, 8, 8)


def test_the_leader_goes_first_then_one_of_each_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six processes on three machines, as threads."""
    gate, order, lock = threading.Barrier(6), list[int](), threading.Lock()
    monkeypatch.setattr(dist, "barrier", lambda group: gate.wait(300))

    def work(rank: int) -> None:
        with Team(rank=rank, size=6, local_rank=rank % 2).leader_first(), lock:
            order.append(rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (5, 3, 1, 4, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert order[0] == 0 and set(order[1:3]) == {2, 4} and set(order[3:]) == {1, 3, 5}


class Exchanges(TorchDispatchMode):
    """What processes ask each other for, counted by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__.split(".")[0]] += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def two_processes() -> Iterator[None]:
    """One of two, whose other one answers at once."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize(("once", "gathers", "reduces"), [(False, 3 * (6 + 6 + 1), 3 * 7), (True, 7, 7)])
def test_what_travels_in_a_step_of_three_passes(once: bool, gathers: int, reduces: int) -> None:
    """Of six layers and what lies outside, which a pass gathers once, and layers for the backward pass again."""
    model, team = cla_model("llama", None).train(), Team("cpu", 0, 2, shards=2)
    assert model.config.num_hidden_layers == 6
    team.shard(model, torch.float32, once=once)
    for _ in range(2):  # steps
        with Exchanges() as exchanges:
            for last in (False, False, True):
                team.begin_pass(model, last=last, once=once)
                model(torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
        assert exchanges.counts["_allgather_base_"] == gathers
        assert exchanges.counts["_reduce_scatter_base_"] == reduces
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
