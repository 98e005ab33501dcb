"""A new initialisation, loss and sharing pattern are one file each: those of tests/additions, used like our own."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cla_convert import pipeline
from cla_convert.conversion.initialisation import INITIALISATIONS
from cla_convert.conversion.inspect import inspect_model
from cla_convert.conversion.pattern import PATTERNS
from cla_convert.errors import UsageError
from cla_convert.recipe_file import load_recipe
from cla_convert.recipes import reference
from cla_convert.registry import Registry
from cla_convert.training.loss import IGNORE, KL
from cla_convert.training.train_loss import LOSSES, ByAutograd, Chunk

SMALL = [
    "train.sequence_length=32", "train.batch_tokens=128", "train.validation_tokens=256", "device=cpu",
    "convert.init=mean", "eval.tasks=[winogrande]", "eval.limit=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def additions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registered by plain imports, and gone again afterwards."""
    registries: list[Registry] = [INITIALISATIONS, LOSSES, PATTERNS]
    for registry in registries:
        registry.names()
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    for name in ("last", "zeros", "reverse_kl", "pairs"):
        importlib.import_module(f"tests.additions.{name}")
    yield
    for name in ("last", "zeros", "reverse_kl", "pairs"):
        del sys.modules[f"tests.additions.{name}"]


def run(model: Path, out: Path, until: str, *settings: str) -> dict:
    recipe = load_recipe(None, [f"source.model={model}", *SMALL, *settings]).recipe
    return pipeline.to_json(pipeline.run(recipe, out, until=until))


def test_a_new_initialisation_converts(tiny_llama: Path, tmp_path: Path) -> None:
    run(tiny_llama, tmp_path / "run", "convert", "convert.init=last", "convert.sharing=cla2")
    before = load_file(tiny_llama / "model.safetensors")
    after = load_file(tmp_path / "run" / "converted" / "model.safetensors")
    name = "model.layers.{}.self_attn.k_proj.weight".format
    assert torch.equal(after[name(0)], before[name(1)]) and name(1) not in after


def test_one_that_brings_patches_says_so_in_the_plan(tiny_llama: Path, tmp_path: Path) -> None:
    run(tiny_llama, tmp_path / "run", "convert", "convert.init=zeros", "convert.sharing=cla2-keep-ends")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["init"] == "zeros" and plan["tensors"]["pool"] == 0 and plan["tensors"]["fit"] > 0
    after = load_file(tmp_path / "run" / "converted" / "model.safetensors")
    assert not after["model.layers.1.self_attn.v_proj.weight"].any()


def test_a_new_pattern_is_planned_and_inspected(tiny_llama: Path, tmp_path: Path) -> None:
    plan = run(tiny_llama, tmp_path / "run", "plan", "convert.sharing=pairs:2")
    assert plan["kv_source_layers"] == [0, 1, 2, 2, 4, 4]
    assert inspect_model(str(tiny_llama))["patterns"]["pairs:2"]["kv_layers"] == 4


def test_a_new_loss_trains(tiny_llama: Path, tmp_path: Path) -> None:
    settings = ("train.tokens=4096", "train.loss=reverse_kl", "train.hidden_weight=0", "train.learning_rate=3e-3")
    result = run(tiny_llama, tmp_path / "run", "uptrain", *settings)
    assert result["objective"] == "reverse_kl" and 0 < result["loss"] < result["first_loss"]


def test_a_term_by_autograd_is_the_one_whose_gradient_is_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 5, 11, generator=generator)
    labels = torch.tensor([3, IGNORE, 0, 10, 7])
    chunk = Chunk(logits, teacher, labels, labels != IGNORE, temperature=2.0)

    def divergence(one: Chunk) -> torch.Tensor:
        assert one.teacher is not None
        log_p, log_q = (x.div(2.0).log_softmax(-1) for x in (one.logits, one.teacher))
        return 4.0 * (log_q.exp() * (log_q - log_p)).sum(-1)

    found, expected = ByAutograd("mine", divergence)(chunk, 0.3), KL(chunk, 0.3)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][chunk.counted], expected[1][chunk.counted])


def test_help_texts_docs_and_refusals_know_them() -> None:
    for name in ("last", "zeros", "reverse_kl", "pairs[:n]"):
        assert f"{name}: " in reference()
    with pytest.raises(UsageError, match="Did you mean 'reverse_kl'"):
        load_recipe(None, ["train.loss=reverse-kl"])
    with pytest.raises(UsageError, match="Did you mean 'zeros'"):
        load_recipe(None, ["convert.init=zeroes"])
    with pytest.raises(UsageError, match="Did you mean 'pairs:2'"):
        load_recipe(None, ["convert.sharing=pair:2"])


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="already"):
        INITIALISATIONS.register(INITIALISATIONS.named("mean"))


def test_names_cost_no_torch() -> None:
    """All modules that register something ours are imported for the help of `convert` and for a recipe."""
    code = (
        "import sys; from cla_convert.recipes import reference; from cla_convert.cli import convert; reference();"
        "sys.exit([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
