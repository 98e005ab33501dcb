"""What a recipe may ask of uptraining: other losses and teachers, parts of the model, compiling, trackers, an alarm."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cla_convert import pipeline
from cla_convert.errors import InputError, TrainingError
from cla_convert.files import read_rows
from cla_convert.models.export import load_model
from cla_convert.run_folder import RunFolder
from cla_convert.stages.check import check
from cla_convert.training.objective import Objective
from cla_convert.training.step import gradients
from cla_convert.training.trainer import set_up

from ..conftest import save_tiny_llama
from .test_uptrain import BATCH, LENGTH, interrupted_run, recipe, uptrain, weights, work

__all__ = ["work"]


@pytest.fixture(scope="module")
def large_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another width and depth, and an embedding padded from 258 to 264 rows."""
    folder = tmp_path_factory.mktemp("teacher") / "large"
    return save_tiny_llama(folder, seed=1, vocab_size=264, hidden_size=48, num_hidden_layers=8, head_dim=12)


def steps(folder: Path) -> list[dict[str, Any]]:
    """The rows of training steps in metrics.jsonl."""
    return [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def streams(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What goes into every layer but the first, and what comes out of the last: [layers, rows, T - 1, hidden]."""
    found: list[torch.Tensor] = []
    layers = model.model.layers
    hooks = [layer.register_forward_pre_hook(lambda _, args: found.append(args[0])) for layer in layers[1:]]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: found.append(args[0])))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)[:, :, :-1]


def test_all_losses_together_are_what_they_say(work: Path, tiny_llama: Path) -> None:
    options = dict(temperature=2.0, cross_entropy_weight=0.5, hidden_weight=0.25)
    trainer = set_up(work / "converted", tiny_llama, recipe(work, **options), "cpu")
    loss, kl, cross_entropy, hidden = gradients(trainer, 0, BATCH).sum(0)
    student, teacher = (load_model(f, dtype=torch.float32) for f in (work / "converted", tiny_llama))
    ids = torch.from_numpy(trainer.sequences.rows(BATCH))
    with torch.no_grad():
        logits, target = student(ids).logits[:, :-1], teacher(ids).logits[:, :-1]
        mine, theirs = (streams(model, ids) for model in (student, teacher))
    log_p, log_q = (logits / 2).log_softmax(-1), (target / 2).log_softmax(-1)
    torch.testing.assert_close(kl, 4 * (log_q.exp() * (log_q - log_p)).sum(-1).mean(), rtol=1e-4, atol=1e-5)
    labels = ids[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)
    torch.testing.assert_close(cross_entropy, expected, rtol=1e-4, atol=1e-5)
    longer = torch.maximum(mine.norm(dim=-1), theirs.norm(dim=-1))
    distance = ((mine - theirs).norm(dim=-1) / longer).square().mean()
    torch.testing.assert_close(hidden, distance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, kl + 0.5 * cross_entropy)
    for done in (0.0, 0.5):
        wanted, (loss, *_, hidden) = trainer.objective(trainer.student, ids, None, 1.0, done)
        torch.testing.assert_close(wanted, loss + (1 - done) * 0.25 * hidden)


def test_a_mixed_loss_is_recorded_term_by_term(work: Path, tiny_llama: Path, tmp_path: Path) -> None:
    settings = recipe(work, steps=3, cross_entropy_weight=0.5, hidden_weight=0.1)
    uptrain(work, tiny_llama, tmp_path, settings)
    for row in steps(tmp_path):
        assert row["hidden"] > 0
        total = row["kl"] + 0.5 * row["cross_entropy"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)


def test_a_larger_teacher_with_a_padded_embedding(work: Path, large_teacher: Path, tmp_path: Path) -> None:
    trainer = set_up(work / "converted", large_teacher, recipe(work), "cpu")
    mine = gradients(trainer, 0, BATCH)[..., 0].sum()
    ids = torch.from_numpy(trainer.sequences.rows(BATCH))
    with torch.no_grad():
        log_p = load_model(work / "converted")(ids).logits[:, :-1].log_softmax(-1)
        log_q = load_model(large_teacher)(ids).logits[:, :-1, :258].log_softmax(-1)
    torch.testing.assert_close(mine, (log_q.exp() * (log_q - log_p)).sum(-1).mean(), rtol=1e-4, atol=1e-5)
    result = uptrain(work, large_teacher, tmp_path, recipe(work))
    assert result["loss"] < 0.9 * result["first_loss"]


def test_teachers_that_do_not_fit_are_refused_before_work(
    work: Path, tiny_llama: Path, large_teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="their sizes differ"):
        uptrain(work, large_teacher, tmp_path / "a", recipe(work, hidden_weight=1.0))
    other = save_tiny_llama(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="another vocabulary") as caught:
        uptrain(work, other, tmp_path / "b", recipe(work))
    assert "2 of 258 tokens differ, such as 'A'" in caught.value.why
    uptrain(work, other, tmp_path / "c", recipe(work, steps=1, loss="cross_entropy"))  # no teacher, no objection
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_teacher_that_does_not_know_the_text_is_refused(work: Path, tmp_path: Path) -> None:
    few = save_tiny_llama(tmp_path / "few", seed=1, vocab_size=64)
    with pytest.raises(InputError, match=r"tokenizer is not the teacher's(.|\n)*the teacher knows 64"):
        set_up(work / "converted", few, recipe(work), "cpu")


@pytest.mark.parametrize("loss", ["distill", "cross_entropy"])
def test_a_model_with_weights_that_are_no_numbers_is_refused_by_name(work: Path, tmp_path: Path, loss: str) -> None:
    """A teacher that distils; else the model to train."""
    ruined = save_tiny_llama(tmp_path / "ruined", seed=1)
    tensors = load_file(ruined / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, ruined / "model.safetensors", metadata={"format": "pt"})
    pair = (work / "converted", ruined) if loss == "distill" else (ruined, ruined)
    with pytest.raises(InputError, match=r"no number(.|\n)*in model\.norm\.weight"):
        set_up(*pair, recipe(work, loss=loss, learning_rate=1e-3), "cpu")


def test_a_run_names_its_teacher_and_is_refused_before_it_converts(
    work: Path, tiny_llama: Path, large_teacher: Path, tmp_path: Path
) -> None:
    settings = recipe(work, teacher=str(large_teacher))
    settings.source.model = str(tiny_llama)
    settings.eval.tasks = ["wikitext"]  # some answers of the others are longer than the tiny context
    folder = RunFolder(tmp_path / "run")
    assert folder.source(settings) == tiny_llama and folder.teacher(settings) == large_teacher
    check(settings, folder)
    settings.train.hidden_weight = 1.0
    with pytest.raises(InputError, match="their sizes differ"):
        pipeline.run(settings, tmp_path / "run")
    assert not (tmp_path / "run" / "converted").exists()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_not_trained_stays_byte_for_byte(
    work: Path, tiny_llama: Path, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = recipe(work, steps=4, parameters="attention", learning_rate=1e-2, precision=precision)
    result = uptrain(work, tiny_llama, tmp_path, settings)
    assert result["loss"] < result["first_loss"]
    before, after = load_file(work / "converted" / "model.safetensors"), weights(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".self_attn." in name}
    frozen = sum(tensor.numel() for name, tensor in before.items() if name not in changed)
    size = 4 if precision == "float32" else 2
    assert f"teacher and student share {frozen * size / 1024:.1f} KiB of frozen weights" in capsys.readouterr().err


def test_each_part_is_trained_at_its_own_rate(work: Path, tiny_llama: Path, tmp_path: Path) -> None:
    settings = recipe(work, steps=1, learning_rates={"attention": 1e-2, "other": 1e-5}, warmup=0.0)
    said = uptrain(work, tiny_llama, tmp_path, settings)
    assert (said["learning_rate"], said["learning_rates"]) == (3e-3, {"attention": 1e-2, "other": 1e-5})
    before, after = load_file(work / "converted" / "model.safetensors"), weights(tmp_path)
    for name, tensor in after.items():
        if "_proj" in name:  # Adam's first step has the size of the learning rate, whatever the gradient's
            moved = (tensor - before[name]).abs().max().item()
            assert moved == pytest.approx(1e-2 * 0.55 if "self_attn" in name else 1e-5 * 0.55, rel=0.02)


def test_a_compiled_run_is_the_same_run(
    work: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, so that only the order of sums may differ. Its second pass of a step is filled to three rows."""
    torch._dynamo.reset()
    passes, healthy = list[int](), Objective.__call__

    def watched(self: Objective, student: Any, ids: torch.Tensor, *rest: Any) -> Any:
        passes.append(len(ids))
        return healthy(self, student, ids, *rest)

    monkeypatch.setattr(Objective, "__call__", watched)
    settings = dict(steps=3, micro_batch_size=3, hidden_weight=0.5)
    plain = uptrain(work, tiny_llama, tmp_path / "plain", recipe(work, **settings))
    assert passes == [3, BATCH - 3] * 3
    passes.clear()
    fused = uptrain(work, tiny_llama, tmp_path / "fused", recipe(work, compile=True, **settings))
    assert passes == [3, 3] * 3
    assert fused["compiled"] and not plain["compiled"]
    rows = [
        [row for row in read_rows(tmp_path / name / "metrics.jsonl") if "loss" in row] for name in ("plain", "fused")
    ]
    for mine, theirs in zip(*rows, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    torch._dynamo.reset()


def test_a_loss_that_jumps_and_stays_stops_the_run(
    work: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are damaged in step 30, as by a fault of memory; the rate is too low to mend them soon."""
    calls, healthy = 0, Objective.__call__

    def damaging(self: Objective, student: Any, *batch: Any) -> Any:
        nonlocal calls
        calls += 1  # two micro-batches a step
        if calls == 2 * 29 + 1:
            with torch.no_grad():
                student.get_output_embeddings().weight.mul_(-3)
        return healthy(self, student, *batch)

    monkeypatch.setattr(Objective, "__call__", damaging)
    every = BATCH * LENGTH
    settings = recipe(work, steps=60, learning_rate=1e-4, checkpoint_every=every, validate_every=0)
    with pytest.raises(TrainingError) as caught:
        uptrain(work, tiny_llama, tmp_path, settings)
    assert caught.value.what == (
        f"The loss jumped at step 30 and stayed there, sequences {29 * BATCH} to {39 * BATCH - 1}"
    )
    assert "step-00000029" in caught.value.why
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000028", "step-00000029"]  # what came after did not push the good ones out
    # The alarm may be turned off, and the run goes on from there.
    monkeypatch.undo()
    settings.train.spike = 0
    assert uptrain(work, tiny_llama, tmp_path, settings)["steps"] == 60


def test_tensorboard_gets_every_number_and_resumes(
    work: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(work, steps=3, log_to=["tensorboard"])
    interrupted_run(work, tiny_llama, tmp_path, monkeypatch, settings)
    uptrain(work, tiny_llama, tmp_path, settings)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = read_rows(tmp_path / "metrics.jsonl")
    for name in ("loss", "lr", "grad_norm", "validation_perplexity"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert [(event.step, event.value) for event in events.Scalars(f"train/{name}")] == expected


def test_weights_and_biases_keeps_one_run_over_a_resume(
    work: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = recipe(work, steps=2, log_to=["wandb"])
    interrupted_run(work, tiny_llama, tmp_path, monkeypatch, settings)
    name = (tmp_path / "wandb.id").read_text()
    uptrain(work, tiny_llama, tmp_path, settings)
    records = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert {path.name for path in records} == {f"run-{name}.wandb"} and (tmp_path / "wandb.id").read_text() == name
    assert all(b"grad_norm" in path.read_bytes() for path in records)


def test_a_tracker_that_is_not_installed_is_refused_before_work(
    work: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cla_convert.training.trackers.find_spec", lambda _: None)
    with pytest.raises(InputError, match="not installed") as caught:
        uptrain(work, tiny_llama, tmp_path, recipe(work, log_to=["wandb"]))
    assert "pip install 'cla-convert[wandb]'" in caught.value.fix
    assert not (tmp_path / "metrics.jsonl").exists()
