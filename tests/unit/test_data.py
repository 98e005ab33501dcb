"""Sources, split, mixture, cache and sample order."""

import csv
import gzip
import hashlib
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetInfo, HfApi
from tokenizers import processors

from cla_convert.console import progress
from cla_convert.errors import InputError, UsageError
from cla_convert.models import long_text
from cla_convert.pipeline import run
from cla_convert.recipe import Data, Recipe, TextSource, Train
from cla_convert.recipe_file import validate
from cla_convert.training import data as data_module
from cla_convert.training import tokenise
from cla_convert.training.data import (
    Sequences,
    TokenStore,
    calibration_rows,
    held_out_rows,
    prepare_data,
    say_passes,
    store_for,
)
from cla_convert.training.sources import SAMPLE, Document, _commit, documents, local_files, pinned
from tests.conftest import Counting, byte_tokenizer

TEXTS = [f"Document {i}: " + chr(97 + i % 26) * (20 + i) for i in range(200)]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "text.parquet"
    pq.write_table(pa.table({"text": TEXTS, "title": ["t"] * len(TEXTS)}), path)
    return path


def prepare(tmp_path: Path, *sources: TextSource, seed: int = 0, share: float = 0.2, **options: int) -> TokenStore:
    limits = {"tokens": 1_000_000, "held_out_tokens": 1_000_000} | options
    data = Data(sources=list(sources), held_out=share)
    return prepare_data(data, byte_tokenizer(), cache_dir=tmp_path / "cache", seed=seed, **limits)


def texts(tokens: np.ndarray) -> set[str]:
    """The documents in a token stream, cut at EOS (id 1)."""
    return {text for text in byte_tokenizer().decode(tokens.tolist()).split("<|eos|>") if text}


def test_every_document_lands_on_one_side_whole_and_ended_by_eos(tmp_path: Path, table: Path) -> None:
    store = prepare(tmp_path, TextSource(path=str(table)))
    train, held_out = texts(store.train), texts(store.held_out)
    assert not train & held_out and train | held_out == set(TEXTS)
    assert 0.1 < len(held_out) / len(TEXTS) < 0.3
    assert store.train.dtype == np.uint16 and store.train[-1] == 1
    assert store.info["train"] == {"tokens": store.train.size, "documents": len(train)}


def test_the_split_of_a_document_depends_on_itself_and_the_seed_only(tmp_path: Path, table: Path) -> None:
    before = texts(prepare(tmp_path, TextSource(path=str(table))).held_out)
    more = tmp_path / "more.parquet"
    pq.write_table(pa.table({"text": [f"Something else {i}" for i in range(100)] + TEXTS[::-1]}), more)
    after = texts(prepare(tmp_path, TextSource(path=str(more))).held_out)
    assert before <= after
    assert texts(prepare(tmp_path, TextSource(path=str(table)), seed=1).held_out) != before


def test_rows_of_one_work_stay_together(tmp_path: Path) -> None:
    rows = [{"text": f"work {i // 10} part {i}", "work": i // 10} for i in range(300)]
    path = tmp_path / "works.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    store = prepare(tmp_path, TextSource(path=str(path), document_field="work"))

    def works(tokens: np.ndarray) -> set[str]:
        return {text.split()[1] for text in texts(tokens)}

    assert works(store.train) and works(store.held_out)
    assert not works(store.train) & works(store.held_out)


def test_few_works_are_held_out_without_reading_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none of the works is held out by its hash, more rows of them would never change that."""
    monkeypatch.setattr(tokenise, "_FEW", 256)
    monkeypatch.setattr(tokenise, "_PATIENCE", 2)
    path, seen = tmp_path / "works.jsonl", list[str]()
    with path.open("w") as file:
        for i in range(20_000):
            file.write(json.dumps({"text": f"work {i % 2} part {i}", "work": f"w{i % 2}"}) + "\n")
    source = TextSource(path=str(path), document_field="work")
    original = tokenise.ByShare.holds_out
    monkeypatch.setattr(tokenise.ByShare, "holds_out", lambda self, key: (seen.append(key), original(self, key))[1])
    store = prepare(tmp_path, source, share=1e-6, tokens=1000, held_out_tokens=200)
    assert store.train.size == 1000 and store.held_out.size == 200
    assert len(seen) < 15_000


def test_a_row_of_no_work_is_a_document_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "works.jsonl"
    rows = [{"text": f"part {i}", "work": "one" if i < 10 else None} for i in range(300)]
    path.write_text("\n".join(map(json.dumps, rows)))
    store = prepare(tmp_path, TextSource(path=str(path), document_field="work"))
    share = len(texts(store.held_out)) / len(rows)
    assert 0.1 < share < 0.3  # all rows of a work named None would fall on one side


def test_files_of_a_folder_that_are_not_read_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "corpus"
    for name in ("a.txt", "b.txt", "deep/c.csv", "d.csv", "e.jsonl.zst", "LICENCE", ".DS_Store"):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text(f"Text of {name}")
    store = prepare(tmp_path, TextSource(path=str(corpus)))
    assert store.info["sources"][0]["passed_over"] == {".csv": 2, ".zst": 1, "": 1}
    assert "corpus: files that are not read: 2 .csv, 1 .zst, 1 without an ending. Supported" in capsys.readouterr().err
    prepare(tmp_path, TextSource(path=str(corpus / "*.txt")))
    assert "not read" not in capsys.readouterr().err  # nobody asked for more


def test_hidden_files_are_no_text_and_an_ending_may_be_in_capitals(tmp_path: Path) -> None:
    for name in ("a.TXT", "._a.txt", ".git/b.txt", "deep/.notes.md", "C.JSONL"):
        path = tmp_path / ".corpora" / "mine" / name  # only what is hidden inside of the folder counts
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("JSONL") else name)
    found = local_files(TextSource(path=str(tmp_path / ".corpora" / "mine")))
    assert [file.name for file in found] == ["C.JSONL", "a.TXT"]
    read = [document for file in found for document in documents(TextSource(path=str(file)), 0)]
    assert [document.content for document in read] == ["C.JSONL", "a.TXT"]


def test_no_more_tokens_than_asked_for(tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = prepare(tmp_path, TextSource(path=str(table)), tokens=1000, held_out_tokens=300)
    assert store.train.size == 1000 and store.held_out.size == 300
    full = prepare(tmp_path, TextSource(path=str(table)))
    capsys.readouterr()
    say_passes(full, full.train.size)
    assert not capsys.readouterr().err
    say_passes(full, 2 * full.train.size)
    assert "repeated, 2 passes in all" in capsys.readouterr().err
    assert (full.train[:1000] == store.train).all()


def test_held_out_text_comes_from_several_documents(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i:02}" * 1000}) for i in range(60)))
    store = prepare(tmp_path, TextSource(path=str(path)), share=0.4, held_out_tokens=1600)
    heads = {text[:2] for text in byte_tokenizer().batch_decode(store.held_out.reshape(8, 200).tolist())}
    assert store.held_out.size == 1600 and len(heads) == 8
    # Few documents: the rest of the long ones makes up for it.
    path.write_text("\n".join(json.dumps({"text": f"{i:02}" * 1000}) for i in range(6)))
    assert prepare(tmp_path, TextSource(path=str(path)), share=0.4, held_out_tokens=1600).held_out.size == 1600


def test_every_format_gives_the_same_documents(tmp_path: Path, table: Path) -> None:
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    folder = tmp_path / "folder" / "deep"
    folder.mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.{'md' if i % 2 else 'txt'}").write_text(text)
    (folder / "ignored.bin").write_bytes(b"\xff")
    for path in (table, tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", folder.parent, tmp_path / "folder/**/*"):
        found = [str(document.content) for document in documents(TextSource(path=str(path)), seed=0)]
        assert sorted(found) == sorted(TEXTS), path


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "hello"}', encoding="utf-8-sig")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress('{"text": "hello"}'.encode("utf-8-sig")))
    for name in ("a.txt", "b.jsonl", "c.jsonl.gz"):
        found = [document.content for document in documents(TextSource(path=str(tmp_path / name)), seed=0)]
        assert found == ["hello"], name


def test_a_folder_that_datasets_reads_is_a_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["body", "id"], *([text, i] for i, text in enumerate(TEXTS))])
    source = TextSource(dataset=str(folder), text_field="body")
    store = prepare(tmp_path, source)
    assert texts(store.train) | texts(store.held_out) == set(TEXTS)
    (folder / "train.csv").write_text("body,id\nonly this,0\nand that,1\n")
    assert prepare(tmp_path, source).digest != store.digest


def test_the_cache_is_used_and_follows_what_it_depends_on(tmp_path: Path, table: Path) -> None:
    source = TextSource(path=str(table))
    first = prepare(tmp_path, source, tokens=500)
    marks = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")}
    again = prepare(tmp_path, source, tokens=500)
    assert again.digest == first.digest and len(marks) == 3
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")} == marks
    pq.write_table(pa.table({"text": [text.upper() for text in TEXTS]}), table)
    assert prepare(tmp_path, source, tokens=500).digest != first.digest
    assert prepare(tmp_path, source, tokens=501).train.size == 501


@pytest.mark.parametrize("damage", ["zeros", "cut off", "no info", "half an info"])
@pytest.mark.parametrize("name", ["train", "held_out", "starts"])
def test_a_damaged_entry_is_tokenised_again(
    tmp_path: Path, table: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = TextSource(path=str(table))
    whole = prepare(tmp_path, source, tokens=500)
    content = [whole.train.tobytes(), whole.held_out.tobytes(), whole.starts.tobytes()]
    (file,) = (tmp_path / "cache").glob(f"*/{name}.bin")
    if "info" in damage:
        text = (file.parent / "info.json").read_text()
        (file.parent / "info.json").write_text(text[: len(text) // 2])
        if damage == "no info":
            (file.parent / "info.json").unlink()
    else:
        size = file.stat().st_size
        os.truncate(file, size // 2)
        os.truncate(file, size if damage == "zeros" else size // 2)
    again = prepare(tmp_path, source, tokens=500)
    assert [again.train.tobytes(), again.held_out.tobytes(), again.starts.tobytes()] == content
    assert again.digest == whole.digest and capsys.readouterr().err.count("damaged: it is made again") == 1


def test_an_entry_is_looked_through_once(tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TextSource(path=str(table))
    prepare(tmp_path, source, tokens=500)
    prepare(tmp_path, source, tokens=500)
    monkeypatch.setattr(data_module, "_digest", lambda folder: pytest.fail("read once more"))
    prepare(tmp_path, source, tokens=500)


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(InputError, match="Line 2"):
        prepare(tmp_path, TextSource(path=str(path)))
    assert not list((tmp_path / "cache").iterdir())


def test_one_document_is_held_out_at_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "one.txt"
    path.write_text("".join(f"{i} " for i in range(2000)))
    store = prepare(tmp_path, TextSource(path=str(path)), share=0.1)
    assert "held" in capsys.readouterr().err
    joined = np.concatenate([store.train, store.held_out])
    assert texts(joined) == {path.read_text()}
    assert store.held_out.size == pytest.approx(joined.size * 0.1, abs=1)


def words(tokens: np.ndarray) -> set[str]:
    return set(byte_tokenizer().decode(tokens.tolist()).replace("<|eos|>", " ").split())


def write_rows(path: Path, rows: list[dict[str, str]]) -> TextSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextSource(path=str(path), document_field="work" if "work" in rows[0] else None)


LONG = " ".join(str(10_000 + i) for i in range(500))
"""A text whose words all differ."""


@pytest.mark.parametrize(
    "copies", [[LONG] * 300, [LONG, LONG + "\n", LONG.replace(" ", "  ")], [LONG + " " * i for i in range(9)]]
)
def test_of_one_document_many_times_nothing_held_out_is_trained_on(tmp_path: Path, copies: list[str]) -> None:
    """Also where the copies differ in white space, and have other hashes."""
    store = prepare(tmp_path, write_rows(tmp_path / "rows.jsonl", [{"text": copy} for copy in copies]), share=0.1)
    assert words(store.train) and words(store.held_out)
    assert len(words(store.train) & words(store.held_out)) <= 1  # the word at which it is cut


def test_works_with_the_same_parts_do_not_hold_out_what_is_trained_on(tmp_path: Path) -> None:
    parts = [f"part{i:03}" for i in range(40)]
    rows = [
        {"text": f"{part} of w{work}" if work % 2 else part, "work": f"w{work}"} for work in range(60) for part in parts
    ]
    store = prepare(tmp_path, write_rows(tmp_path / "rows.jsonl", rows))
    assert not texts(store.train) & texts(store.held_out)
    kept = byte_tokenizer().decode(store.held_out.tolist()).split("<|eos|>")
    assert len(kept) == len(set(kept)) > 40  # what counts twice would only look like more


def test_text_of_two_sources_stays_on_one_side(tmp_path: Path) -> None:
    """Of few documents the smallest hashes are held out, of many a share; by works it is otherwise again."""
    many = [{"text": f"text number {i}"} for i in range(300)]
    few = write_rows(tmp_path / "few.jsonl", many[:8])
    by_work = write_rows(tmp_path / "by-work.jsonl", [row | {"work": str(i % 20)} for i, row in enumerate(many)])
    for sources in itertools.permutations((few, by_work, write_rows(tmp_path / "many.jsonl", many))):
        store = prepare(tmp_path, *sources, share=0.05)
        assert texts(store.train) and texts(store.held_out)
        assert not texts(store.train) & texts(store.held_out)


def test_the_end_of_a_document_that_another_source_trains_on_is_not_held_out(tmp_path: Path) -> None:
    rows = [{"text": LONG}, *({"text": f"text number {i}"} for i in range(200))]
    alone = write_rows(tmp_path / "alone.jsonl", rows[:1])
    seed = next(
        seed
        for seed in range(9)
        if LONG in texts(prepare(tmp_path, write_rows(tmp_path / "all.jsonl", rows), seed=seed).train)
    )
    sources = [write_rows(tmp_path / "all.jsonl", rows), alone]
    store = prepare(tmp_path, *sources, seed=seed)
    assert not words(store.held_out) & set(LONG.split())
    store = prepare(tmp_path, *reversed(sources), seed=seed)
    assert len(words(store.train) & words(store.held_out) & set(LONG.split())) <= 1
    with pytest.raises(InputError, match="alone.jsonl' holds no text to train on") as told:
        prepare(tmp_path, alone, alone)
    assert "held out by another source" in told.value.why


def test_bos_comes_first_if_the_tokenizer_adds_one(tmp_path: Path, table: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    data = Data(sources=[TextSource(path=str(table))])
    with_bos = prepare_data(data, tokenizer, tokens=5000, held_out_tokens=10, cache_dir=tmp_path / "c", seed=0)
    without = prepare(tmp_path, TextSource(path=str(table)), share=data.held_out, tokens=5000, held_out_tokens=10)
    assert with_bos.train[0] == 0 and without.train[0] != 0
    ends = np.flatnonzero(with_bos.train[:-1] == 1)
    assert (with_bos.train[ends + 1] == 0).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "nowhere/text.parquet"}, "no such file"),
        ({"path": "text.parqet"}, "Did you mean 'text.parquet'"),
        ({"path": "text.parquet", "text_field": "txet"}, "Did you mean 'text'"),
        ({"path": "text.parquet", "text_field": "content"}, "'text', 'title'"),
        ({"path": "numbers.jsonl"}, "is not text"),
        ({"path": "empty.jsonl"}, "holds no text"),
        ({"path": "fake.parquet"}, "not a parquet file"),
        ({"path": "latin.txt"}, "It is not UTF-8: byte 0xe9"),
        ({"path": "data.csv"}, "Supported"),
        ({"dataset": "no-such-owner/no-such-dataset"}, "the dataset 'no-such-owner/no-such-dataset'"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path: Path, table: Path, source: dict[str, Any], message: str) -> None:
    (tmp_path / "numbers.jsonl").write_text('{"text": 5}')
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": " "}\n{"text": null}\n')
    (tmp_path / "fake.parquet").write_text("not parquet")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "data.csv").write_text("a,b")
    if "path" in source:
        source = source | {"path": str(tmp_path / source["path"])}
    with pytest.raises(InputError) as caught:
        prepare(tmp_path, TextSource(**source))
    assert message in str(caught.value)


def test_each_epoch_shows_every_row_once_in_a_new_order() -> None:
    tokens = np.arange(103, dtype=np.uint16)
    sequences = Sequences(tokens, 10, seed=3)
    epochs = [sequences.rows(10, start) for start in (0, 10, 20)]
    assert epochs[0].dtype == np.int64 and epochs[0].shape == (10, 10)
    for epoch in epochs:
        assert sorted(epoch[:, 0]) == list(range(0, 100, 10))
        assert (epoch == epoch[:, :1] + np.arange(10)).all()
    assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()


def test_the_order_is_a_pure_function_of_seed_and_index() -> None:
    tokens = np.arange(1000, dtype=np.uint32)
    straight = Sequences(tokens, 10, seed=3).rows(250)
    jumping = Sequences(tokens, 10, seed=3)
    for index in (249, 0, 120, 99, 100, 5):
        assert (jumping.row(index) == straight[index]).all()
    assert not (Sequences(tokens, 10, seed=4).rows(100) == straight[:100]).all()


def test_any_number_of_processes_sees_the_same_rows() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    alone = Sequences(tokens, 10, seed=3).rows(240)  # more than two epochs
    for processes in (2, 3, 8):
        ranks = [Sequences(tokens, 10, seed=3) for _ in range(processes)]
        rows = [ranks[index % processes].row(index) for index in range(240)]
        assert (np.stack(rows) == alone).all()


def test_every_row_begins_with_bos_where_the_tokenizer_begins_so(tmp_path: Path, table: Path) -> None:
    store = prepare(tmp_path, TextSource(path=str(table)))
    assert store.first == ()  # the tiny tokenizer puts nothing in front
    tokens = np.arange(10, 1000, dtype=np.uint16)
    plain, begun = Sequences(tokens, 10, seed=3).rows(200), Sequences(tokens, 10, seed=3, first=[2]).rows(200)
    assert (begun[:, 0] == 2).all() and (begun[:, 1:] == plain[:, 1:]).all()
    begun_store = TokenStore(tokens, tokens, "", {"leading": [2]}, np.empty(0))
    recipe = validate({"convert": {"calibration": {"tokens": 500, "sequence_length": 50}}})
    assert (calibration_rows(begun_store, 500, 50, seed=0)[:, 0] == 2).all()
    assert (held_out_rows(begun_store, recipe.train)[:, 0] == 2).all()


def test_all_that_the_tokenizer_puts_in_front_of_a_text_comes_first(tmp_path: Path, table: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    tokenizer.bos_token = None
    front = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    pairs = list(zip(["[gMASK]", "<sop>"], front, strict=True))
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=pairs)
    data = Data(sources=[TextSource(path=str(table))])
    store = prepare_data(data, tokenizer, tokens=2000, held_out_tokens=200, cache_dir=tmp_path, seed=0)
    assert store.first == tuple(front) and store.train[:2].tolist() == front
    assert all(store.train[start : start + 2].tolist() == front for start in store.starts[:-1])
    assert (calibration_rows(store, 500, 50, seed=0)[:, :2] == front).all()


def test_positions_start_anew_with_each_document(tmp_path: Path, table: Path) -> None:
    store = prepare(tmp_path, TextSource(path=str(table)))
    assert (store.starts[1:] == np.flatnonzero(store.train[:-1] == 1) + 1).all() and store.starts[0] == 0
    sequences = Sequences(store.train, 50, seed=0, starts=store.starts)
    rows, positions = sequences.rows(sequences.count), sequences.positions(sequences.count)
    assert positions is not None and positions.shape == rows.shape
    for row, position in zip(rows, positions, strict=True):
        begins = [0, *np.flatnonzero(row[:-1] == 1) + 1, 50]
        expected = np.concatenate([np.arange(end - begin) for begin, end in itertools.pairwise(begins)])
        assert (position == expected).all()
    assert sequences.boundaries(sequences.count) == (positions[:, 1:] == 0).sum()
    assert sequences.boundaries(3, 5) == (positions[5:8, 1:] == 0).sum()
    assert Sequences(store.train, 50, seed=0).positions(3) is None


def test_no_held_out_document_is_trained_or_calibrated_on(tmp_path: Path, table: Path) -> None:
    """Rows of all three uses, of a recipe with a mixture: no document's number on both sides."""
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"Document {i}: " + "y" * 50}) for i in range(200, 500)))
    settings = {
        "data": {"sources": [{"path": str(table)}, {"path": str(other), "weight": 2}], "held_out": 0.2},
        "convert": {"calibration": {"tokens": 5000, "sequence_length": 100}},
        "train": {"tokens": 20_000, "sequence_length": 100, "batch_tokens": 1000, "validation_tokens": 3000},
    }
    recipe = Recipe.model_validate(settings)
    store = store_for(recipe, byte_tokenizer(), tmp_path, "cpu")

    def numbers(rows: np.ndarray) -> set[str]:
        return set(re.findall(r"Document (\d+):", "\n".join(byte_tokenizer().batch_decode(rows.tolist()))))

    held_out = numbers(held_out_rows(store, recipe.train))
    every = Sequences(store.train, 100, seed=0)
    trained = numbers(every.rows(every.count))
    assert len(held_out) > 20 and len(trained) > 100 and not held_out & trained
    calibrated = numbers(calibration_rows(store, 5000, 100, seed=0))
    assert len(calibrated) > 20 and calibrated <= trained


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(InputError, match="too short"):
        Sequences(np.arange(9, dtype=np.uint16), 10, seed=0)


@pytest.mark.parametrize(
    ("words", "length", "message"),
    [("a few words", 64, "The text is too short"), ("a few words", 8, "no held-out text")],
)
def test_a_handful_of_tokens_is_refused_before_any_work_and_nothing_odd_is_said(
    tmp_path: Path, tiny_llama: Path, words: str, length: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "few.txt").write_text(words)
    settings = {
        "source": {"model": str(tiny_llama)},
        "train": {"tokens": 100_000, "sequence_length": length, "batch_tokens": 1024},
        "data": {"sources": [{"path": str(tmp_path / "few.txt")}]},
        "eval": {"tasks": ["arc_easy"], "limit": 2},
    }
    with pytest.raises(InputError, match=message):
        run(validate(settings), tmp_path / "run")
    said = capsys.readouterr().err
    assert "[1/5]" not in said and "passes" not in said and "held out" not in said
    assert not (tmp_path / "run").exists()


def test_a_run_asks_the_hub_once_for_the_commit_of_a_dataset(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read = list[str](), list[str]()
    _commit.cache_clear()

    def moving(_: HfApi, name: str, **options: Any) -> DatasetInfo:
        asked.append(name)
        return DatasetInfo(id=name, sha=f"commit {len(asked)}")

    def rows(*_: Any, revision: str, **options: Any) -> list[dict[str, str]]:
        read.append(revision)
        return [{"text": text} for text in TEXTS]

    monkeypatch.setattr(HfApi, "dataset_info", moving)
    monkeypatch.setattr(datasets, "load_dataset", rows)
    calibration = {"tokens": 512, "sequence_length": 64, "steps": 1}
    settings = {
        "source": {"model": str(tiny_llama)},
        "convert": {"init": "calibrated", "calibration": calibration},
        "data": {"sources": [{"dataset": "org/moving"}], "held_out": 0.2},
        "train": {"tokens": 1024, "sequence_length": 64, "batch_tokens": 256},
        "eval": {"tasks": ["arc_easy"], "limit": 2},
        "device": "cpu",
    }
    run(validate(settings), tmp_path / "run", until="convert")
    assert asked == ["org/moving"] and len(read) > 1 and set(read) == {"commit 1"}


def test_a_revision_of_a_dataset_that_is_here_is_refused(tmp_path: Path) -> None:
    folder = TextSource(dataset=str(tmp_path))
    assert pinned(folder) == folder
    with pytest.raises(UsageError, match="'v1' was asked for") as refused:
        pinned(folder.model_copy(update={"revision": "v1"}))
    assert str(tmp_path) in refused.value.what


def test_held_out_rows_are_never_repeated() -> None:
    store = TokenStore(np.empty(0), np.arange(100, dtype=np.uint16), "", {}, np.empty(0))
    rows = held_out_rows(store, Train(sequence_length=16, validation_tokens=10_000))
    assert rows.shape == (6, 16) and len(np.unique(rows)) == 96
    short = TokenStore(np.empty(0), np.arange(12, dtype=np.uint16), "", {}, np.empty(0))
    assert held_out_rows(short, Train(sequence_length=16)).shape == (1, 12)


def test_the_shipped_sample_is_the_documented_one() -> None:
    notes = SAMPLE.with_name("README.md").read_text()
    assert hashlib.sha256(SAMPLE.read_bytes()).hexdigest() in notes
    table = pq.read_table(SAMPLE)
    assert {"id", "text", "source", "document"} == set(table.schema.names)
    for source in set(table["source"].to_pylist()):
        assert source in notes


def test_without_sources_the_sample_is_used(tmp_path: Path) -> None:
    store = prepare(tmp_path, tokens=20_000, held_out_tokens=5_000)
    assert store.train.size == 20_000 and store.held_out.size == 5_000
    assert store.info["sources"][0]["name"] == "sample"


def test_a_little_calibration_text_is_taken_from_many_documents(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"Document {i}: " + "y" * 190}) for i in range(400)))
    calibration = {"tokens": 2000, "sequence_length": 100}
    recipe = validate({"data": {"sources": [{"path": str(path)}]}, "convert": {"calibration": calibration}})
    store = store_for(recipe, byte_tokenizer(), tmp_path, "cpu")
    rows = calibration_rows(store, 2000, 100, seed=0)
    assert rows.size == 2000 and store.train.size == 16 * 2000
    begun = re.findall(r"Document (\d+):", "\n".join(byte_tokenizer().batch_decode(rows.tolist())))
    assert max(map(int, begun)) - min(map(int, begun)) > 60  # a stretch of ten documents holds 2000


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_of_a_book_no_more_is_tokenised_than_is_wanted_and_a_piece_at_a_time(tmp_path: Path, ending: str) -> None:
    """A tokenizer keeps more than a hundred bytes of every character: a gigabyte of text is more than any memory."""
    book = "".join(f"word {number} of a book\n" for number in range(200_000))
    file = tmp_path / f"book{ending}"
    file.write_text(book if ending == ".txt" else json.dumps({"text": book}))
    tokenizer, data = Counting(), Data(sources=[TextSource(path=str(file))])
    store = prepare_data(data, tokenizer, tokens=10_000, held_out_tokens=500, cache_dir=tmp_path / "cache", seed=0)
    at_once = long_text.PIECE * long_text.AT_ONCE
    assert max(tokenizer.given) <= at_once and sum(tokenizer.given) < 3 * at_once < len(book)
    assert byte_tokenizer().decode(store.train[:10_000].tolist()) == book[:10_000]
    assert byte_tokenizer().decode(store.held_out.tolist()) == book[10_000:10_500]


def test_of_a_held_out_book_no_more_is_tokenised_than_is_held_out(tmp_path: Path) -> None:
    book, tokenizer, dtype = "word of a book " * 500_000, Counting(), np.dtype(np.uint16)
    with (tmp_path / "train").open("wb") as one, (tmp_path / "held_out").open("wb") as other:
        train, held_out = tokenise.Side(10_000_000, one, dtype), tokenise.Side(500, other, dtype)
        splitter = tokenise.Splitter(tokenizer, tokenise.ByShare(seed=0, share=1.0))
        splitter.fill(iter([[Document(book, "book")]]), train, held_out, progress(0, "tokenising"))
    assert (train.tokens, held_out.tokens) == (0, 500)
    assert sum(tokenizer.given) <= long_text.PIECE * long_text.AT_ONCE < len(book)


@pytest.mark.parametrize("seed", range(20))
def test_a_text_in_pieces_gives_tokens_and_hash_of_the_whole(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    drawn = np.random.default_rng(seed)
    kinds = ["a", "word", " ", "  ", "\n", "\r\n\t", ".", "é", "\u00a0", "猫" * 3, "y" * 70, " " * 60]
    text = "".join(drawn.choice(kinds, size=200))
    tokenizer, whole = byte_tokenizer(), tokenise.encode(byte_tokenizer(), [text], np.dtype(np.uint16))[0]
    number = tokenise.hash_of_content(text)
    assert tokenise.hash_of_content(" ".join(text.split())) == number != tokenise.hash_of_content(text + "x")
    monkeypatch.setattr(long_text, "PIECE", 50)
    monkeypatch.setattr(long_text, "_WORD", 20)
    parts = list(long_text.pieces(text))
    assert "".join(parts) == text and max(map(len, parts)) <= 50
    for size in (1, 7, 60, 1000):
        assert list(long_text.pieces(text[i : i + size] for i in range(0, len(text), size))) == parts
    found = tokenise.encode(tokenizer, ["short", text, np.arange(3)], np.dtype(np.uint16))
    assert np.array_equal(found[1], whole) and np.array_equal(found[2], np.arange(3))
    assert len(tokenise.encode(tokenizer, [text], np.dtype(np.uint16), [30])[0]) >= 30
    assert tokenise.hash_of_content(text) == number
