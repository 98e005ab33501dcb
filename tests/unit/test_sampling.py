"""Text sampled from a model: its own distribution, the same for a seed, kept batch by batch."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cla_convert import console
from cla_convert.errors import InputError
from cla_convert.models.export import load_model
from cla_convert.recipe import Data, Generate, Recipe, TextSource
from cla_convert.training import sampling
from cla_convert.training.data import check_data, prepare_data
from cla_convert.training.sampling import SourceModel, check_sampling, sampled
from cla_convert.training.starts import OPENINGS, openings, separator_losses
from tests.conftest import byte_tokenizer

BOS, EOS, OTHER_END = 0, 1, 77


def shipped_openings() -> list[str]:
    return openings(Generate())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A model whose own generation settings would bend every distribution, and which has a second end of text."""
    copy = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("sampling") / "model")
    own = {"repetition_penalty": 9.0, "top_k": 1, "temperature": 0.1, "min_p": 0.5, "max_length": 3}
    (copy / "generation_config.json").write_text(json.dumps(own | {"eos_token_id": [EOS, OTHER_END]}))
    return copy


@pytest.fixture
def sample(folder: Path, tmp_path: Path) -> Callable[..., list[np.ndarray]]:
    def documents(seed: int = 0, cache: Path = tmp_path, **settings: Any) -> list[np.ndarray]:
        model = SourceModel(folder, "cpu", cache)
        tokens = settings.pop("tokens", 600)
        generate = Generate(**{"tokens": tokens, "length": 20, "batch_size": 8} | settings)
        batches = sampled(model, byte_tokenizer(), generate, seed, lambda: tokens)
        return [np.asarray(document.content) for batch in batches for document in batch]

    return documents


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_distribution_of_the_model(
    folder: Path, sample: Callable[..., list[np.ndarray]], temperature: float
) -> None:
    documents = sample(tokens=16_000, length=8, batch_size=2000, temperature=temperature, start="separator")
    assert all(document[0] == BOS for document in documents)
    # Behind the separator; another one there begins the next document, and leaves one of a single token.
    counts = np.bincount([document[1] for document in documents if document.size > 1], minlength=258)
    with torch.inference_mode():
        logits = load_model(folder)(torch.tensor([[BOS]])).logits[0, -1].clone()
        logits[BOS] = -torch.inf
    for assumed in (1.0, 0.5):
        expected = (logits / assumed).softmax(-1).double().numpy() * counts.sum()
        many = expected > 5
        chi_squared = ((counts - expected)[many] ** 2 / expected[many]).sum() / many.sum()
        assert (chi_squared < 2) == (assumed == temperature), chi_squared


def test_documents_end_where_the_model_ends_them(sample: Callable[..., list[np.ndarray]]) -> None:
    documents = sample(tokens=6000, length=100, batch_size=60, start="separator")
    ends = np.cumsum([document.size for document in documents])
    assert ends[-1] == 6000 and set(range(100, 6001, 100)) <= set(ends)  # rows are full, and documents keep to them
    closed = [np.isin(document[1:], [BOS, EOS, OTHER_END]) for document in documents]
    assert not any(end[:-1].any() for end in closed)
    last = [int(document[-1]) for document, end in zip(documents, ends, strict=True) if end % 100]
    assert last.count(EOS) > 3 and last.count(OTHER_END) > 3
    # The separator ends a document too, and is the first token of the next, which alone holds it.
    assert sum(token not in (EOS, OTHER_END) for token in last) > 3
    assert not any(document[-1] == BOS for document in documents if document.size > 1)


def test_starts(sample: Callable[..., list[np.ndarray]]) -> None:
    alike = sample(top_k=1, tokens=160, start="separator")
    assert len({document.tobytes() for document in alike if document.size == alike[0].size}) == 1
    documents = sample(start="random")
    assert all(document[0] == BOS for document in documents)
    assert len({int(document[1]) for document in documents if document.size > 1}) > 10
    openings = {tuple(byte_tokenizer()(text, add_special_tokens=False).input_ids[:3]) for text in shipped_openings()}
    prefixed = sample(start="prefix", opening_tokens=3, top_k=1)
    begun = [tuple(document[1:4]) for document in prefixed if document.size > 3]
    assert 0.2 < sum(begin in openings for begin in begun) / len(begun) < 1  # a third of them has all three
    kinds = {document.tobytes() for document in sample(start=["separator", "prefix"], top_k=1, opening_tokens=3)}
    assert kinds & {document.tobytes() for document in alike} and len(kinds) > 10


def test_openings_of_ones_own(tmp_path: Path, sample: Callable[..., list[np.ndarray]]) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{letter}Q" * 50}) for letter in "xyz"))
    documents = sample(start="prefix", openings=str(text), opening_tokens=1)
    expected = {byte_tokenizer()(letter, add_special_tokens=False).input_ids[0] for letter in "xyz"}
    assert {int(document[1]) for document in documents if document.size > 1} == expected


def test_the_separator_is_the_token_behind_which_real_documents_are_likely(tiny_llama: Path) -> None:
    model, tokenizer = load_model(tiny_llama, dtype=torch.float32), byte_tokenizer()
    rows = torch.tensor(
        [[EOS, *tokenizer(text, add_special_tokens=False).input_ids[:12]] for text in shipped_openings()[:64]]
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    losses = separator_losses(model, tokenizer)
    assert set(losses) == {BOS, EOS} and losses[EOS] < losses[BOS] - 0.1
    with torch.no_grad():
        assert losses[EOS] == pytest.approx(model(input_ids=rows[:48], labels=rows[:48]).loss.item(), abs=1e-3)


def test_the_least_likely_documents_can_be_left_out(folder: Path, sample: Callable[..., list[np.ndarray]]) -> None:
    settings: dict[str, Any] = {"length": 64, "batch_size": 32, "tokens": 2048, "start": "random"}
    whole, rest = sample(**settings), sample(**settings, drop=0.25)
    model = load_model(folder, dtype=torch.float32)

    def loss(document: np.ndarray) -> float:
        ids = torch.tensor(document.astype(np.int64))[None]
        with torch.no_grad():
            logprobs = model(ids).logits[0, 1:-1].log_softmax(-1)
        return -logprobs.gather(1, ids[0, 2:, None]).mean().item()

    long = [document for document in whole if document.size >= 18]  # two tokens are the prompt
    kept = {document.tobytes() for document in rest}
    dropped = [loss(document) for document in long if document.tobytes() not in kept]
    assert 0.2 < len(dropped) / len(long) < 0.3
    assert min(dropped) > max(loss(document) for document in long if document.tobytes() in kept) - 1e-4


def test_chat_writes_both_turns(tmp_path: Path, folder: Path) -> None:
    tokenizer = byte_tokenizer()
    turns = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|eos|>{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}[bot]{% endif %}"
    settings = Generate(length=400, batch_size=40, start="chat")
    batches = sampled(SourceModel(folder, "cpu", tmp_path), tokenizer, settings, 0, lambda: 0 if taken else 16_000)
    taken: list[np.ndarray] = []
    for batch in batches:
        taken += [np.asarray(document.content) for document in batch]
    whole = [str(tokenizer.decode(ids)) for ids in taken if ids.size > 20]
    assert all(text.startswith("[user]") for text in whole)
    two = [text for text in whole if text.count("<|eos|>") == 2]
    assert all("<|eos|>[bot]" in text and text.endswith("<|eos|>") for text in two) and len(two) > 0
    with pytest.raises(InputError, match="no chat template"):
        check_sampling(SourceModel(folder, "cpu", tmp_path), byte_tokenizer(), settings)


def test_as_much_as_is_wanted(folder: Path, tmp_path: Path) -> None:
    model = SourceModel(folder, "cpu", tmp_path)
    taken: list[int] = []
    batches = sampled(model, byte_tokenizer(), Generate(length=20), 0, lambda: 700 - sum(taken))
    for batch in batches:
        taken += [len(document.content) for document in batch]
    assert sum(taken) == 700  # 35 rows


def test_what_does_not_fit_is_halved(
    folder: Path, sample: Callable[..., list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = sampling._Sampler.sample
    tried: list[int] = []

    def small(self: Any, rows: int, seed: int, bar: Any) -> Any:
        tried.append(rows)
        if rows > 10:
            raise torch.OutOfMemoryError
        return healthy(self, rows, seed, bar)

    monkeypatch.setattr(sampling._Sampler, "sample", small)
    assert sum(document.size for document in sample(batch_size="auto")) == 600
    assert tried == [30, 15, 7, 7, 7, 7, 2]
    with pytest.raises(InputError, match="12 rows of 20 tokens"):
        sample(batch_size=12, cache=folder.parent / "other")


def test_a_seed_fixes_the_samples_wherever_they_stop(
    tmp_path: Path, sample: Callable[..., list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sample(cache=tmp_path / "whole")
    made: list[int] = []
    healthy = sampling._Sampler.sample

    def sick(self: Any, count: int, seed: int, bar: Any) -> Any:
        made.append(seed)
        if len(made) == 3:
            raise KeyboardInterrupt
        return healthy(self, count, seed, bar)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sampling._Sampler, "sample", sick)
        sample(cache=tmp_path / "parts")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.npz")}
    assert len(kept) == 2 and len(list((tmp_path / "parts").rglob("*.*"))) == 3  # and about.json
    again = sample(cache=tmp_path / "parts")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [document.tolist() for document in again] == [document.tolist() for document in whole]
    longer = sample(cache=tmp_path / "parts", tokens=900)
    same = 3 * 8 * 20  # as far as batches are whole
    assert np.concatenate(longer)[:same].tolist() == np.concatenate(whole)[:same].tolist()
    assert np.concatenate(longer)[same:600].tolist() != np.concatenate(whole)[same:].tolist()
    other = sample(seed=1, cache=tmp_path / "whole")
    assert not {d.tobytes() for d in other if d.size > 5} & {d.tobytes() for d in whole}
    with monkeypatch.context() as patch:  # all of it is there: no model is loaded
        patch.setattr(sampling, "load_model", lambda *_, **__: pytest.fail("loaded"))
        assert len(sample(cache=tmp_path / "whole")) == len(whole)


@pytest.mark.parametrize("damage", ["zeros", "cut off", "empty"])
def test_a_damaged_batch_is_sampled_again(
    tmp_path: Path, sample: Callable[..., list[np.ndarray]], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = [document.tolist() for document in sample()]
    file = sorted(tmp_path.rglob("*.npz"))[1]
    size, half = file.stat().st_size, file.stat().st_size // 2
    if damage == "zeros":
        content = file.read_bytes()
        file.write_bytes(content[:100] + bytes(half) + content[100 + half :])
    else:
        os.truncate(file, half if damage == "cut off" else 0)
    for warned in (1, 0):
        assert [document.tolist() for document in sample()] == whole
        assert capsys.readouterr().err.count("sampled again") == warned
    assert file.stat().st_size == size


def test_no_more_is_sampled_than_is_asked_for(folder: Path, tmp_path: Path) -> None:
    """4000 tokens may be sampled, 900 are taken: 45 rows of 20, where a whole batch has 64."""
    settings = Generate(tokens=4000, length=20, batch_size=64)
    taken: list[int] = []
    batches = sampled(SourceModel(folder, "cpu", tmp_path), byte_tokenizer(), settings, 0, lambda: 900 - sum(taken))
    for batch in batches:
        taken += [len(document.content) for document in batch]
        if sum(taken) >= 900:
            break
    kept = sum(np.load(path)["ids"].size for path in tmp_path.rglob("*.npz"))
    assert kept == sum(taken) == 900


def test_the_global_random_state_is_left_alone(sample: Callable[..., list[np.ndarray]]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    sample(tokens=100)
    assert torch.rand(1) == expected


def test_rows_are_no_longer_than_the_model_was_built_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default, too, whose rows are longer."""
    console.TOLD.clear()
    source = SourceModel(folder, "cpu", tmp_path / "samples")

    def digest(**settings: Any) -> str:
        data = Data(sources=[TextSource(generate=Generate(tokens=2000, batch_size=2, **settings))])
        limits = {"tokens": 1500, "held_out_tokens": 100}
        own = tmp_path / f"tokens{len(settings)}"
        return prepare_data(data, byte_tokenizer(), **limits, cache_dir=own, seed=0, model=source).digest

    assert digest() == digest(length=512)
    assert (
        capsys.readouterr().err.count("rows of 512 tokens, which is what the model was built for, and not of 10") == 1
    )
    assert len(list((tmp_path / "samples").iterdir())) == 1


def test_a_source_of_the_mixture(folder: Path, tmp_path: Path, tiny_llama: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{i} " + "x" * 40}) for i in range(400)))
    data = Data(sources=[TextSource(path=str(text)), TextSource(generate=Generate(tokens=2000, length=40))])

    def prepare(model: Path) -> Any:
        source = SourceModel(model, "cpu", tmp_path / "samples")
        limits = {"tokens": 6000, "held_out_tokens": 400}
        return prepare_data(data, byte_tokenizer(), **limits, cache_dir=tmp_path / "tokens", seed=0, model=source)

    store = prepare(folder)
    own, sampled_text = store.info["sources"]
    assert own["tokens"] == sampled_text["tokens"] == 3000
    assert sampled_text["name"] == "sampled from the source model" and 1.4 < sampled_text["passes"] < 2
    assert prepare(folder).digest == store.digest
    assert prepare(tiny_llama).digest != store.digest  # another source model (its ends of text differ)


def test_what_is_wrong_with_a_file_is_told_before_anything_is_sampled(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join([*(json.dumps({"text": f"{i} " + "x" * 40}) for i in range(400)), "no JSON"]))
    data = Data(sources=[TextSource(generate=Generate(tokens=2000, length=40)), TextSource(path=str(text))])
    source = SourceModel(folder, "cpu", tmp_path / "samples")
    limits = {"tokens": 40_000, "held_out_tokens": 400}
    with pytest.raises(InputError, match="Line 401"):
        prepare_data(data, byte_tokenizer(), **limits, cache_dir=tmp_path / "tokens", seed=0, model=source)
    assert not list(tmp_path.rglob("*.npz"))


def test_the_mixture_asks_for_what_its_budget_needs(folder: Path, tmp_path: Path) -> None:
    data = Data(sources=[TextSource(generate=Generate(tokens=100_000, length=40))])
    source = SourceModel(folder, "cpu", tmp_path / "samples")
    limits = {"tokens": 4000, "held_out_tokens": 100}
    store = prepare_data(data, byte_tokenizer(), **limits, cache_dir=tmp_path / "tokens", seed=0, model=source)
    kept = sum(np.load(path)["ids"].size for path in tmp_path.rglob("*.npz"))
    assert store.train.size == 4000 and 4100 <= kept < 4000 / 0.95 + 5 * 40, kept


def test_a_check_before_work_samples_nothing(tiny_llama: Path, cache: Path) -> None:
    """It refuses what sampling would stumble over, and leaves sampling to the stage that needs text."""

    def check(**generate: Any) -> None:
        sources = [{"path": str(OPENINGS)}, {"generate": generate}]
        recipe = Recipe.model_validate({"data": {"sources": sources}, "train": {"tokens": 2000}})
        check_data(recipe, byte_tokenizer(), tiny_llama, "cpu")

    check(length=64)
    check(length=4096)  # cut to what the model was built for
    for wrong, words in (
        ({"length": 64, "start": "chat"}, "no chat template"),
        ({"length": 64, "openings": "nowhere.txt"}, "No text files"),
    ):
        with pytest.raises(InputError, match=words):
            check(**wrong)
    assert not (cache / "samples").exists()
