"""Models that one GPU has no room for: how their layers are laid out, and that keys and values follow them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from cla_convert.errors import InputError
from cla_convert.evaluation.agreement import agreement
from cla_convert.evaluation.answers import answers
from cla_convert.evaluation.cache import kv_cache_of
from cla_convert.evaluation.harness import evaluate
from cla_convert.evaluation.perplexity import row_windows
from cla_convert.models import placement
from cla_convert.models.export import load_model
from cla_convert.models.families import FAMILIES
from cla_convert.models.placement import USABLE, laid_over, load_where_it_fits
from cla_convert.recipe import Evaluate
from tests.conftest import byte_tokenizer
from tests.tiny import cla_model
from tests.unit.test_interface import ONE_OF_EACH, shared_pair

SHARING = [0, 1, 1, 1, 4, 4]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, 258, (3, 24), generator=torch.Generator().manual_seed(1))


def saved(folder: Path, **settings) -> Path:
    cla_model("llama", SHARING, **settings).save_pretrained(folder)
    return folder


def size(folder: Path) -> int:
    return sum(weight.nbytes for weight in load_model(folder).parameters())


def test_layers_lie_one_after_another(tmp_path: Path):
    folder = saved(tmp_path / "model", tie_word_embeddings=False)
    whole = size(folder)
    assert laid_over(folder, "auto", [2 * whole, 0]) is None
    parts = laid_over(folder, "auto", [whole, whole])
    names = [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(6)),
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ]
    assert parts and list(parts) == names
    assert sorted(parts.values()) == list(parts.values()) and 4 <= list(parts.values()).count(0) <= 6  # about half
    crammed = laid_over(folder, "auto", [whole // 3, whole])
    assert crammed and list(crammed.values()).count(0) < 4
    assert laid_over(folder, "bfloat16", [whole // 2 + whole // 8]) is None  # half the bytes, and the rest is free


def test_a_tied_head_lies_with_the_embedding(tmp_path: Path):
    folder = saved(tmp_path / "model", tie_word_embeddings=True)
    parts = laid_over(folder, "auto", [size(folder)] * 2)
    assert parts and parts["lm_head"] == parts["model.embed_tokens"] == 0 and parts["model.norm"] == 1


def test_no_room_at_all_is_told(tmp_path: Path):
    folder = saved(tmp_path / "model")
    room = int(size(folder) / 2.2 / USABLE)
    with pytest.raises(InputError, match=r"no room for model(.|\n)*eval\.agreement_tokens=0"):
        laid_over(folder, "auto", [room, room])


def apart(model, folder: Path):
    """The model with every second layer elsewhere: its weights on the disk, its inputs moved by accelerate's hooks."""
    layers = next(name for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList))
    home: Any = "cpu"
    places: Any = {f"{layers}.{i}": ("cpu", "disk")[i % 2] for i in range(model.config.num_hidden_layers)}
    inner = layers.rpartition(".")[0]
    places |= {f"{inner}.{name}": "cpu" for name, _ in model.base_model.named_children() if name not in layers}
    places |= {name: "cpu" for name, _ in model.named_children() if name != inner}
    return dispatch_model(
        model,
        places,
        main_device=home,
        offload_dir=str(folder),
        skip_keys=model._skip_keys_device_placement,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_follow_the_layers(family: str, tmp_path: Path, ids: torch.Tensor):
    case = ONE_OF_EACH[family]
    model, other = (cla_model(case, shared_pair(family)) for _ in range(2))
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(apart(other, tmp_path)(ids, use_cache=False).logits, expected, rtol=0, atol=0)


def test_everything_is_measured_alike(tmp_path: Path, ids: torch.Tensor):
    source, one, other = cla_model("llama", None, seed=1), cla_model("llama", SHARING), cla_model("llama", SHARING)
    assert_measured_alike(one, apart(other, tmp_path), source, ids)


def assert_measured_alike(one, other, source, ids: torch.Tensor) -> None:
    tokenizer = byte_tokenizer()
    nats = [[nats for nats, _ in row_windows(model, ids)] for model in (one, other)]
    assert nats[1] == pytest.approx(nats[0], rel=1e-5)
    for found, wanted in (
        (agreement(other, source, ids), agreement(one, source, ids)),
        (agreement(source, other, ids), agreement(source, one, ids)),
    ):
        assert found["kl"] == pytest.approx(wanted["kl"], rel=1e-4) and found["top1"] == wanted["top1"]
    assert answers(other, tokenizer, ["Why?"], 6) == answers(one, tokenizer, ["Why?"], 6)
    assert kv_cache_of(other, 16) == kv_cache_of(one, 16)


def test_tasks_and_their_specification_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = saved(tmp_path / "model")
    byte_tokenizer().save_pretrained(folder)
    spec, results = Evaluate(tasks=["openbookqa", "wikitext"], limit=2, max_length=256), []
    places: list[Callable] = [load_where_it_fits, lambda *a, **o: apart(load_where_it_fits(*a, **o), tmp_path)]
    for load in places:
        monkeypatch.setattr(placement, "load_where_it_fits", load)
        results.append(evaluate(folder, spec, tmp_path / str(len(results)), device="cpu", seed=0))
    one, other = results
    assert one["specification_hash"] == other["specification_hash"]
    for task in spec.tasks:
        assert other["tasks"][task] == pytest.approx(one["tasks"][task], rel=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two_gpus(tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    """The owner of layers 2 and 3 lies on the first GPU, some of its consumers on the second."""
    folder = saved(tmp_path / "model", tie_word_embeddings=False)
    cla_model("llama", None, seed=1).save_pretrained(tmp_path / "source")
    whole = size(folder)
    with monkeypatch.context() as small:  # transformers asks it too, for memory that is really there
        small.setattr(placement, "free_memory", lambda: 2 * [int(0.65 * whole)])
        other: Any = load_where_it_fits(folder, dtype="float32", device="cuda")
    assert other.hf_device_map["model.layers.1"] == 0 and other.hf_device_map["model.layers.3"] == 1
    source = load_model(tmp_path / "source", device="cuda")
    assert_measured_alike(load_model(folder, device="cuda"), other, source, ids)
