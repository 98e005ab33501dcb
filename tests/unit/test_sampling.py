"""Text sampled from a model: its own distribution, the same for a seed, kept batch by batch."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cla_convert.errors import InputError
from cla_convert.models.export import load_model
from cla_convert.recipe import Data, Generate, TextSource
from cla_convert.training import sampling
from cla_convert.training.data import prepare_data
from cla_convert.training.sampling import SourceModel, sampled
from tests.conftest import byte_tokenizer

EOS, OTHER_END = 1, 77


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
        generate = Generate(**{"tokens": 600, "length": 20, "batch_size": 8} | settings)
        batches = sampled(model, byte_tokenizer(), generate, seed, lambda: generate.tokens)
        return [np.asarray(document.content) for batch in batches for document in batch]

    return documents


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_distribution_of_the_model(
    folder: Path, sample: Callable[..., list[np.ndarray]], temperature: float
) -> None:
    documents = sample(tokens=16_000, length=8, batch_size=2000, temperature=temperature)
    assert all(document[0] == 0 for document in documents)  # BOS
    counts = np.bincount([document[1] for document in documents], minlength=258)
    with torch.inference_mode():
        logits = load_model(folder)(torch.tensor([[0]])).logits[0, -1]
    for assumed in (1.0, 0.5):
        expected = (logits / assumed).softmax(-1).double().numpy() * len(documents)
        many = expected > 5
        chi_squared = ((counts - expected)[many] ** 2 / expected[many]).sum() / many.sum()
        assert (chi_squared < 2) == (assumed == temperature), chi_squared


def test_documents_end_where_the_model_ends_them(sample: Callable[..., list[np.ndarray]]) -> None:
    documents = sample(tokens=6000, length=100, batch_size=60)
    assert sum(document.size for document in documents) == 6000
    ends = [np.isin(document[1:], [EOS, OTHER_END]) for document in documents[:-1]]  # the last is cut at the budget
    assert not any(end[:-1].any() for end in ends)
    early = {int(document[-1]) for document in documents[:-1] if document.size < 100}
    assert early == {EOS, OTHER_END}
    assert all(document.size <= 100 for document in documents)


def test_top_k_and_random_starts(sample: Callable[..., list[np.ndarray]]) -> None:
    greedy = {document[:20].tobytes() for document in sample(top_k=1)}
    assert len(greedy) <= 2  # whole, and cut at the budget
    documents = sample(start="random")
    assert len({int(document[0]) for document in documents}) > 10  # no BOS: the tokenizer puts none
    assert not {int(document[0]) for document in documents} & {0, 1}
    assert len({document.tobytes() for document in sample(top_k=1, start="random")}) > 10


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
    assert len(kept) == 2 and len(list((tmp_path / "parts").rglob("*.*"))) == 2
    again = sample(cache=tmp_path / "parts")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [document.tolist() for document in again] == [document.tolist() for document in whole]
    longer = sample(cache=tmp_path / "parts", tokens=900)
    same = 8 * len(list((tmp_path / "whole").rglob("*-8.npz")))  # as far as its batches are whole
    assert len(whole) > same >= 24 and [d.tolist() for d in longer[:same]] == [d.tolist() for d in whole[:same]]
    other = sample(seed=1, cache=tmp_path / "whole")
    assert not {d.tobytes() for d in other if d.size > 5} & {d.tobytes() for d in whole}
    with monkeypatch.context() as patch:  # all of it is there: no model is loaded
        patch.setattr(sampling, "load_model", lambda *_, **__: pytest.fail("loaded"))
        assert len(sample(cache=tmp_path / "whole")) == len(whole)


def test_no_more_is_sampled_than_is_asked_for(folder: Path, tmp_path: Path) -> None:
    """4000 tokens may be sampled, 900 are taken: about fifty documents, where three whole batches have 192."""
    settings = Generate(tokens=4000, length=20, batch_size=64)
    taken: list[int] = []
    batches = sampled(SourceModel(folder, "cpu", tmp_path), byte_tokenizer(), settings, 0, lambda: 900 - sum(taken))
    for batch in batches:
        taken += [len(document.content) for document in batch]
        if sum(taken) >= 900:
            break
    kept = sum(np.load(path)["ids"].size for path in tmp_path.rglob("*.npz"))
    assert kept == sum(taken) and 900 <= kept < 900 + 5 * 20


def test_the_global_random_state_is_left_alone(sample: Callable[..., list[np.ndarray]]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    sample(tokens=100)
    assert torch.rand(1) == expected


def test_a_document_must_fit_the_model(sample: Callable[..., list[np.ndarray]]) -> None:
    with pytest.raises(InputError, match="more than the model's 512 positions"):
        sample(length=513)


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


def test_the_mixture_asks_for_what_its_budget_needs(folder: Path, tmp_path: Path) -> None:
    data = Data(sources=[TextSource(generate=Generate(tokens=100_000, length=40))])
    source = SourceModel(folder, "cpu", tmp_path / "samples")
    limits = {"tokens": 4000, "held_out_tokens": 100}
    store = prepare_data(data, byte_tokenizer(), **limits, cache_dir=tmp_path / "tokens", seed=0, model=source)
    kept = sum(np.load(path)["ids"].size for path in tmp_path.rglob("*.npz"))
    assert store.train.size == 4000 and 4100 <= kept < 4000 / 0.95 + 5 * 40
