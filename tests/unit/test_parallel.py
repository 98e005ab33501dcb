"""How a step's sequences are divided among processes."""

from hypothesis import given
from hypothesis import strategies as st

from cla_convert.training.parallel import share

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
