"""Perplexity of text files, agreement with the source model, and measuring nothing twice."""

import gzip
import hashlib
import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from cla_convert.errors import InputError
from cla_convert.evaluation import text_files
from cla_convert.evaluation import texts as module
from cla_convert.evaluation.agreement import agreement
from cla_convert.evaluation.text_files import content_of
from cla_convert.evaluation.texts import Texts, check_texts, measure_texts, text_perplexity
from cla_convert.files import write_json
from cla_convert.models import long_text
from cla_convert.models.export import load_model, load_tokenizer
from cla_convert.recipe import TextFile
from cla_convert.recipe_file import load_recipe
from cla_convert.report.report import build_report
from cla_convert.run_folder import RunFolder
from cla_convert.stages.evaluate import texts_of
from tests.conftest import Counting, save_tiny_llama
from tests.tiny import save_tiny

COMMON = {"batch_size": 2, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The source and another model."""
    return [save_tiny_llama(tmp_path_factory.mktemp("texts") / str(seed), seed=seed) for seed in (0, 1)]


@pytest.fixture
def story(tmp_path: Path) -> TextFile:
    (tmp_path / "story.txt").write_bytes("Zoë read the map.\r\nThere was no north on it; only a river, twice.".encode())
    return TextFile(name="story", path=str(tmp_path / "story.txt"), window=16)


def test_every_token_is_predicted_once_from_its_window(models: list[Path], story: TextFile):
    model = load_model(models[0])
    found = text_perplexity(model, models[0], story, batch_size=2)
    ids = load_tokenizer(models[0])(Path(story.path).read_bytes().decode(), add_special_tokens=False)["input_ids"]
    nats = 0.0
    for start in range(0, len(ids), 16):
        window = ids[start : start + 16]
        with torch.no_grad():
            logits = model(torch.tensor([[0, *window[:-1]]])).logits[0].double()  # 0 is BOS
        nats -= logits.log_softmax(-1).gather(-1, torch.tensor(window)[:, None]).sum().item()
    assert found["tokens"] == len(ids) == found["bytes"]  # a tokenizer of bytes
    assert found["nll"] == pytest.approx(nats / len(ids), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / len(ids)), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"], rel=1e-6)
    assert [tokens for _, tokens in found["windows"]] == [16] * (len(ids) // 16) + [len(ids) % 16]


def test_bits_per_byte_count_the_bytes_that_were_read(models: list[Path], story: TextFile):
    part = story.model_copy(update={"characters": 10})
    found = text_perplexity(load_model(models[0]), models[0], part, batch_size=2)
    assert (found["characters"], found["bytes"]) == (10, 11)  # the e with its dots has two


def test_what_cannot_be_read_is_refused_before_work(tmp_path: Path, models: list[Path], story: TextFile):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, words in (("nowhere", "cannot be read"), ("empty", "is empty"), ("latin", "cannot be read")):
        with pytest.raises(InputError, match=words):
            check_texts([TextFile(name=name, path=str(tmp_path / name))])
    check_texts([story])
    with pytest.raises(InputError, match="600 tokens does not fit"):
        text_perplexity(load_model(models[0]), models[0], story.model_copy(update={"window": 600}), batch_size=1)


TEXTS = ["Zoë's first text,\r\nof two lines.", "A second one \u732b."]


def write_table(path: Path, column: str) -> None:
    rows = [{"id": 1, column: TEXTS[0]}, {"id": 2, column: " \n"}, {"id": 3, column: TEXTS[1]}]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def test_markup_that_is_measured_as_text_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("a.csv", "b.JSON", "c.txt", "d.py"):
        (tmp_path / name).write_text("a,b\n1,2\n")
        check_texts([TextFile(name="a", path=str(tmp_path / name))])
        assert ("with its markup" in capsys.readouterr().err) is (name[0] in "ab")


def test_progress_is_called_by_the_model_and_not_by_the_folder_of_the_results(
    models: list[Path], tmp_path: Path, story: TextFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "progress", lambda total, what, **options: said.append(what) or nullcontext())
    for label in ("", "after"):
        measure_texts(Texts([story]), models[0], tmp_path / f"tmp{label}", COMMON, "model", device="cpu", label=label)
    assert said == [f"perplexity/{story.name}", f"after: perplexity/{story.name}"]


@pytest.mark.parametrize("ending", ["jsonl", "JSONL", "jsonl.gz", "parquet"])
def test_of_a_table_the_texts_are_measured_and_not_its_markup(
    models: list[Path], tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, table, other = (tmp_path / f"{name}" for name in ("t.txt", f"t.{ending}", f"o.{ending}"))
    plain.write_bytes("\n\n".join(TEXTS).encode())
    write_table(table, "text")
    write_table(other, "content")
    texts = [TextFile(name="t", path=str(path), window=16) for path in (plain, table, other)]
    texts[2] = texts[2].model_copy(update={"text_field": "content"})
    wanted, *found = [text_perplexity(load_model(models[0]), models[0], text, 2) for text in texts]
    assert [one | {"path": str(plain)} for one in found] == [wanted, wanted]
    check_texts(texts)
    with pytest.raises(InputError, match="no column 'text'"):
        check_texts([texts[0], TextFile(name="o", path=str(other))])
    monkeypatch.setattr(text_files, "WHOLE", 7)
    part = texts[1].model_copy(update={"characters": 40})
    assert content_of(part).characters == 40 and content_of(texts[1]).sha256 == wanted["sha256"]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("characters", [None, 3001])
def test_of_a_long_text_a_part_at_a_time_is_in_memory_and_the_numbers_stay(
    models: list[Path], tmp_path: Path, batch: int, characters: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer keeps more than a hundred bytes of every character: 2 GB of text are more than any memory."""
    path = tmp_path / "long.txt"
    path.write_bytes("".join(f"Zoë's wörd {number}\r\n of a \u732b bo\rok\n" for number in range(200)).encode())
    text = TextFile(name="long", path=str(path), window=48, characters=characters)
    tokenizer: Any = Counting()

    def measured() -> dict:
        return text_perplexity(load_model(models[0]), models[0], text, batch)

    whole, at_once = measured(), torch.cat(list(text_files.windows(text, tokenizer, 10**9))[:-1])
    identity = content_of(text).identity
    read = path.read_bytes().decode()[:characters]
    assert identity == [hashlib.sha256(read.encode()).hexdigest()] == [whole["sha256"]]
    assert (whole["characters"], whole["bytes"]) == (len(read), len(read.encode()))
    assert at_once[:, 1:].flatten().tolist() == tokenizer(read).input_ids[: at_once[:, 1:].numel()]
    for name, value in (("PIECE", 64), ("_WORD", 30), ("AT_ONCE", 2)):
        monkeypatch.setattr(long_text, name, value)
    monkeypatch.setattr(text_files, "WHOLE", 200)
    monkeypatch.setattr(module, "_BATCHES", 2)
    assert measured() == whole
    tokenizer.given.clear()
    parts = list(text_files.windows(text, tokenizer, 4))
    assert torch.equal(torch.cat(parts[:-1]), at_once) and max(map(len, parts)) == 4 and max(tokenizer.given) <= 128
    assert content_of(text).identity == [*identity, "in pieces"]  # which other tokenizers may cut otherwise

    tokenizer.given.clear()
    some = text_files.beginning(text, tokenizer, 100, first=[0])
    assert some is not None and sum(tokenizer.given) <= 8 * (100 + 64) < len(read)
    assert [row[1:] for row in some.tolist()] == [tokenizer(read).input_ids[i : i + 48][1:] for i in (0, 48)]
    assert some[:, 0].tolist() == [0, 0]
    few = text_files.beginning(text, tokenizer, 20)
    assert few is not None and few.shape == (1, 20)


def test_letters_of_a_token_are_found_out(tmp_path: Path) -> None:
    """A tokenizer with long words gives few tokens for the first characters: more are read until there are enough."""
    words = Tokenizer(WordLevel({"[UNK]": 0, "a" * 50: 1, "b" * 90: 2}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[UNK]")
    (tmp_path / "t.txt").write_text(f"{'a' * 50} {'b' * 90} " * 400)
    text = TextFile(name="t", path=str(tmp_path / "t.txt"), window=32)
    for window, tokens, found in ((32, 256, 256), (32, 700, 672), (32, 2000, 800), (27, 54, 54)):
        # of 54 tokens the last would be read in part: 4 * 8 * (54 + 64) characters end within it
        rows = text_files.beginning(text.model_copy(update={"window": window}), tokenizer, tokens)
        assert rows is not None and rows.flatten().tolist() == [1, 2] * (found // 2)


def rows() -> torch.Tensor:
    return torch.randint(2, 258, (5, 12), generator=torch.Generator().manual_seed(1))


def test_agreement_equals_its_definition(models: list[Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cla_convert.models.scoring._LOGITS", 258 * 7)  # 7 positions at a time
    source, model = map(load_model, models)
    found = agreement(model, source, rows(), batch_size=2)
    with torch.no_grad():
        q, p = (one(rows()).logits.double().log_softmax(-1) for one in (source, model))
    kl, same = (q.exp() * (q - p)).sum(-1), (q.argmax(-1) == p.argmax(-1)).double()
    assert found["kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found["kl"] > 0.1
    assert found["top1"] == pytest.approx(same.mean().item())
    assert [w[0] for w in found["windows"]] == pytest.approx(kl.sum(1).tolist(), rel=1e-5)
    assert [w[1] for w in found["windows"]] == same.sum(1).tolist()
    assert found["ci95"]["kl"][0] < found["kl"] < found["ci95"]["kl"][1]
    assert found["tokens"] == 60


def test_a_model_agrees_with_itself(models: list[Path]):
    model = load_model(models[0])
    found = agreement(model, model, rows())
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["top1"] == 1.0


def test_files_and_nothing_twice(models: list[Path], story: TextFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loads: list[Path] = []
    monkeypatch.setattr(
        module, "load_where_it_fits", lambda folder, **o: (loads.append(folder), load_model(folder, **o))[1]
    )
    texts = Texts([story], rows(), rows()[:2], source=models[0])
    source = measure_texts(texts, models[0], tmp_path / "before", COMMON, "source", device="cpu")
    assert set(source) == {"held_out", "perplexity/story"}  # the source agrees with itself: not measured
    assert loads == [models[0]]
    first = measure_texts(texts, models[1], tmp_path / "after", COMMON, "other", device="cpu")
    assert set(first) == {"held_out", "agreement", "perplexity/story"}
    assert loads == [models[0], models[1], models[0]]
    written = json.loads((tmp_path / "after" / "agreement.json").read_text())
    assert written["kl"] == first["agreement"]["kl"] and len(written["windows"]) == 2
    assert measure_texts(texts, models[1], tmp_path / "after", COMMON, "other", device="cpu") == first
    assert len(loads) == 3  # all found
    single = measure_texts(texts, models[1], tmp_path / "after", COMMON | {"batch_size": 1}, "other", device="cpu")
    assert len(loads) == 5  # other settings: all anew
    Path(story.path).write_text("Another story.")
    changed = measure_texts(texts, models[1], tmp_path / "after", COMMON | {"batch_size": 1}, "other", device="cpu")
    assert len(loads) == 6 and changed["held_out"] == single["held_out"]
    assert changed["perplexity/story"]["bytes"] == 14


def test_what_is_not_asked_for_any_more_is_not_judged_either(models: list[Path], story: TextFile, tmp_path: Path):
    everything = Texts([story], rows(), rows()[:2], source=models[0], domains={"law": rows()[:1]})
    measure_texts(everything, models[1], tmp_path, COMMON, "other", device="cpu")
    assert {file.stem for file in tmp_path.rglob("*.json")} == {"held_out", "agreement", "domains", "story"}
    measure_texts(Texts(held_out=rows()), models[1], tmp_path, COMMON, "other", device="cpu")
    assert [file.stem for file in tmp_path.rglob("*.json")] == ["held_out"]


def test_a_text_file_is_compared_with_the_source_as_a_domain_is(models: list[Path], story: TextFile, tmp_path: Path):
    """The same tokens give the same numbers, whichever list of texts they are of; perplexity is not measured again."""
    tokenizer = load_tokenizer(models[0])
    part = text_files.beginning(story, tokenizer, 48, first=[0])
    assert part is not None and part.shape == (3, 16)
    ids = torch.tensor(tokenizer(Path(story.path).read_bytes().decode(), add_special_tokens=False).input_ids)
    assert torch.equal(part, text_files.packed(ids, 16, [0])[:3])

    def found(model: Path, compared: bool = True) -> dict:
        texts = Texts([story], compared={"story": part} if compared else {}, domains={"law": part}, source=models[0])
        return measure_texts(texts, model, tmp_path / model.name, COMMON, str(model), device="cpu")

    assert "agreement/story" not in found(models[0])  # the source is itself
    old = found(models[1], compared=False)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / models[1].name).rglob("*.json")}
    new = found(models[1])
    assert {path for path in times if path.stat().st_mtime_ns != times[path]} == set()  # of an older run, all stays
    assert new == old | {"agreement/story": new["agreement/story"]}
    assert new["agreement/story"] == new["domains"]["domains"]["law"] and new["agreement/story"]["kl"] > 0.1
    assert "agreement/story" not in found(models[1], compared=False)
    assert not (tmp_path / models[1].name / "agreement" / "story.json").exists()

    same = shutil.copytree(models[0], tmp_path / "identity")  # a conversion that shares nothing
    assert found(same)["agreement/story"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found(same)["agreement/story"]["top1"] == 1.0


def test_of_a_text_of_a_single_token_nothing_is_compared(models: list[Path], tmp_path: Path):
    (tmp_path / "x.txt").write_text("x")
    text = TextFile(name="x", path=str(tmp_path / "x.txt"))
    assert text_files.beginning(text, load_tokenizer(models[0]), 100) is None


def test_another_source_is_another_comparison(tmp_path: Path):
    source, other = (save_tiny_llama(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    texts = Texts(agreement_rows=rows()[:2], domains={"law": rows()[:1]}, source=source)
    measure_texts(texts, other, tmp_path / "after", COMMON, "other", device="cpu")
    shutil.copyfile(other / "model.safetensors", source / "model.safetensors")
    found = measure_texts(texts, other, tmp_path / "after", COMMON, "other", device="cpu")
    assert found["agreement"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["domains"]["domains"]["law"]["kl"] == pytest.approx(0, abs=1e-6)


def test_a_window_may_be_all_of_the_context(story: TextFile, tmp_path: Path):
    folder = save_tiny("gpt_bigcode", tmp_path / "learned")
    model = load_model(folder)
    whole = story.model_copy(update={"window": model.config.n_positions})
    Path(story.path).write_text("ab " * model.config.n_positions)
    assert text_perplexity(model, folder, whole, batch_size=2)["tokens"] > model.config.n_positions


def test_text_that_changed_since_training_is_told(
    tmp_path: Path, tiny_llama: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was trained on stays what the domains are held against; what is held out now may have been seen."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()

    def write(word: str) -> None:
        for i in range(40):
            (corpus / f"{i}.txt").write_text(f"{word} {i} " * 40)

    mine = "".join(f"first {i} " * 3 for i in range(40))
    (tmp_path / "mine.txt").write_text(mine)
    sets = ["train.tokens=2k", "train.sequence_length=64", "convert.init=mean", "eval.prompts=[]", "device=cpu"]
    sets += [f"eval.perplexity=[{{name: mine, path: {tmp_path}/mine.txt, window: 64}}]", "eval.agreement_tokens=900"]
    recipe = load_recipe(None, [f"source.model={tiny_llama}", f"data.sources=[{{path: {corpus}}}]", *sets]).recipe
    folder = RunFolder(run_dir)
    write("first")
    train = json.loads(folder.training.result.path.read_text())
    folder.training.result.path.unlink()
    first = texts_of(recipe, folder)
    known = folder.evaluation.domains.read()
    assert first.compared["mine"].shape == (min(900, len(mine)) // 64, 64)
    assert known is not None and 0 < known.texts["mine"]["contained"] < 1
    assert texts_of(recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"perplexity": []})}), folder)
    none = folder.evaluation.domains.read()
    assert none is not None and none.domains == known.domains and none.texts == {}
    texts_of(recipe, folder)
    assert folder.evaluation.domains.read() == known
    (tmp_path / "mine.txt").write_text("of something else " * 60)
    texts_of(recipe, folder)
    other = folder.evaluation.domains.read()
    assert other is not None and other.texts["mine"]["contained"] == 0 and other.domains == known.domains
    (tmp_path / "mine.txt").write_text(mine)
    texts_of(recipe, folder)
    assert folder.evaluation.domains.read() == known
    more = {"objective": "distill", "first_loss": 2.0, "validation": [], "processes": 1, "data_digest": first.text}
    write_json(folder.training.result.path, train | more)
    assert texts_of(recipe, folder).text == first.text and "than was trained on" not in capsys.readouterr().err

    write("second")
    second = texts_of(recipe, folder)
    assert second.text != first.text and "gives other tokens now than was trained on" in capsys.readouterr().err
    assert folder.evaluation.domains.read() == known and known is not None and known.text == first.text
    # the source was measured before a training on more text that leaves the same rows out: it is not measured again
    for point, text, told in (
        ("before", second.text, False), ("after", first.text, False), ("after", second.text, True),
    ):  # fmt: skip
        path = folder.evaluation.point(point).measured("held_out")
        write_json(path, json.loads(path.read_text()) | {"text": text})
        said = " ".join(build_report(run_dir)["caveats"])
        assert ("HELD-OUT TEXT IS NOT OF THE TEXT THAT WAS TRAINED ON" in said) is told
