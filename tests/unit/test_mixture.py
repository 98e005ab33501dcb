"""Sources in the proportions of their weights, whatever their sizes."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from cla_convert.errors import InputError
from cla_convert.recipe import TextSource
from cla_convert.training.data import TokenStore
from cla_convert.training.mixture import _join, balanced, shares
from cla_convert.training.tokenise import Side
from tests.conftest import byte_tokenizer
from tests.unit.test_data import prepare, texts


def source(folder: Path, name: str, *, tokens: int, each: int, weight: float = 1.0) -> TextSource:
    """A file of about `tokens` tokens in documents of `each`, all made of the letter `name` and a number."""
    rows = [json.dumps({"text": f"{i:05}".rjust(each - 1, name)}) for i in range(tokens // each)]
    (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return TextSource(path=str(folder / f"{name}.jsonl"), weight=weight)


def shares_of(tokens: np.ndarray) -> dict[str, int]:
    """Tokens of each source, by its letter; documents are cut at the end of a share."""
    documents = byte_tokenizer().decode(tokens.tolist()).replace("<|eos|>", "\n").splitlines()
    counts: dict[str, int] = {}
    for document in documents:
        counts[document[0]] = counts.get(document[0], 0) + len(document)
    return counts


def weighted(store: TokenStore) -> list[int]:
    return [entry["tokens"] for entry in store.info["sources"]]


def test_weights_count_tokens_not_documents(tmp_path: Path) -> None:
    sources = [
        source(tmp_path, "a", tokens=60_000, each=6000, weight=1),  # a single document is larger than its share
        source(tmp_path, "b", tokens=60_000, each=30, weight=3),
        source(tmp_path, "c", tokens=60_000, each=300, weight=0.5),
    ]
    store = prepare(tmp_path, *sources, tokens=9_000, held_out_tokens=900)
    assert weighted(store) == [2000, 6000, 1000] and store.train.size == 9000
    counts = shares_of(store.train)
    assert counts["a"] == pytest.approx(2000, abs=40) and counts["c"] == pytest.approx(1000, abs=10)
    held_out = shares_of(store.held_out)
    assert held_out["b"] > 2 * held_out["a"] > 2 * held_out["c"] > 0


def test_a_source_that_is_too_small_is_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [source(tmp_path, "b", tokens=1000, each=50), source(tmp_path, "a", tokens=60_000, each=50)]
    store = prepare(tmp_path, *sources, tokens=8220, held_out_tokens=500)
    assert weighted(store) == [4110, 4110]
    passes = store.info["sources"][0]["passes"]
    assert passes == pytest.approx(4110 / 800, rel=0.2) and passes % 1  # the last one is cut
    assert "b.jsonl holds" in (notes := capsys.readouterr().err) and "passes" in notes and "a.jsonl" not in notes
    assert shares_of(store.train)["b"] == pytest.approx(4110 - 82, abs=60)  # an EOS for each of its 82 documents
    begins = np.flatnonzero(store.train[:-1] == 1) + 1  # of repeated documents too, and of the second source
    assert store.starts.tolist() == sorted({0, 4110, *begins.tolist()})
    assert not texts(store.train) & texts(store.held_out)
    held_out = [text for text in byte_tokenizer().decode(store.held_out.tolist()).split("<|eos|>") if text]
    assert len(held_out) == len(set(held_out))


def test_when_all_are_too_small_the_weights_still_hold(tmp_path: Path) -> None:
    sources = [
        source(tmp_path, "a", tokens=4000, each=50, weight=3),
        source(tmp_path, "b", tokens=1000, each=50, weight=1.5),
    ]
    store = prepare(tmp_path, *sources, tokens=1_000_000, held_out_tokens=500)
    large, small = weighted(store)
    assert large == pytest.approx(2 * small, abs=2)
    assert [entry["passes"] for entry in store.info["sources"]] == [1.0, pytest.approx(2, rel=0.2)]
    assert store.train.size == large + small < 10_000


def test_every_source_has_text_on_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one of a single document, whichever side of the split that falls on."""
    for seed in range(4):
        single = tmp_path / "b.txt"
        single.write_text("b" * 3000)
        sources = [source(tmp_path, "a", tokens=10_000, each=50), TextSource(path=str(single))]
        store = prepare(tmp_path, *sources, tokens=4000, held_out_tokens=1000, seed=seed, share=0.49)
        assert weighted(store) == [2000, 2000]
        assert shares_of(store.held_out)["b"] == 500
        assert "b.txt is a single document: its last 500 tokens" in (notes := capsys.readouterr().err)
        assert "repeated" not in notes and store.info["sources"][1]["passes"] == 1  # it was read on, not cut short


@pytest.mark.parametrize("seed", range(6))
def test_of_a_few_documents_whole_ones_are_held_out(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture) -> None:
    """Where all fall on one side of the split, those with the smallest hashes; and nothing that was read is cut off."""
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"{number:02} " * 300)
    store = prepare(
        tmp_path, TextSource(path=str(tmp_path / "*.txt")), tokens=5000, held_out_tokens=500, seed=seed, share=0.01
    )
    kept, used = (set(byte_tokenizer().decode(side).split()) for side in (store.held_out, store.train))
    assert store.train.size == 5000 and store.held_out.size == 500
    assert len({word[:2] for word in kept if word[:2].isdigit()} & {word[:2] for word in used}) == 0
    assert store.info["held_out"]["tail_of_train"] == 0
    assert not {"too few", "repeated", "single"} & set(capsys.readouterr().err.split())


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    with pytest.raises(InputError, match="empty.jsonl' holds no text"):
        prepare(tmp_path, source(tmp_path, "a", tokens=1000, each=50), TextSource(path=str(empty)))


def test_shares_add_up() -> None:
    assert shares(100, [1, 1, 1]) == [33, 34, 33]
    assert shares(9000, [1, 3, 0.5]) == [2000, 6000, 1000]
    assert shares(3, [1e-9, 1]) == [0, 3]


def test_balancing_takes_the_best_filled_source_once() -> None:
    assert balanced([100, 10], [100, 50]) == [100, 50]  # one is full: all shares as wanted
    assert balanced([80, 10], [100, 50]) == [80, 40]
    assert balanced([0, 10], [0, 50]) == [0, 10]
    assert balanced([0], [0]) == [0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux'")
def test_a_full_disk_says_so(tmp_path: Path) -> None:
    """Also of many tokens at once, and while sources are put together."""
    ids, full = np.arange(100_000, dtype=np.uint16), Path("/dev/full")
    with full.open("w+b", buffering=0) as file, pytest.raises(OSError) as told:
        Side(ids.size, file, ids.dtype).add(ids)
    assert told.value.errno == errno.ENOSPC
    with (tmp_path / "part").open("w+b") as file:
        side = Side(ids.size, file, ids.dtype)
        side.add(ids)
    with pytest.raises(OSError) as told:
        _join([side], [ids.size], full)
    assert told.value.errno == errno.ENOSPC
    starts = _join([side], [150_000], tmp_path / "joined")
    assert starts.tolist() == [0, 100_000]
    assert np.array_equal(np.fromfile(tmp_path / "joined", ids.dtype), np.concatenate([ids, ids[:50_000]]))
