"""The training loop on tiny models: it learns, accumulates, stops, resumes exactly and refuses what it must."""

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cla_convert.conversion.convert import convert
from cla_convert.conversion.plan import make_plan
from cla_convert.errors import InputError, Interrupted, TrainingError
from cla_convert.files import read_rows
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import load_model
from cla_convert.models.scoring import hidden_states
from cla_convert.recipe import Recipe
from cla_convert.recipe_file import validate
from cla_convert.run_folder import TrainingFolder
from cla_convert.training import loop, micro_batch
from cla_convert.training.objective import Objective
from cla_convert.training.parallel import Team
from cla_convert.training.step import gradients
from cla_convert.training.stop import StopRequest
from cla_convert.training.trainer import set_up
from tests.tiny import save_tiny

LENGTH, BATCH = 32, 4


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path):
    """A folder with a converted tiny model, text, and a cache of its own."""
    folder = tmp_path_factory.mktemp("uptrain")
    checkpoint = Checkpoint.open(tiny_llama)
    convert(make_plan(checkpoint, sharing="cla2", init="mean"), checkpoint, folder / "converted")
    words = ["the", "cat", "sat", "on", "mats", "while", "dogs", "ran", "over", "green", "hills", "to", "see", "ships"]
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(words, k=60))} for _ in range(60)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLA_CONVERT_CACHE", str(folder / "cache"))
        yield folder


def recipe(work: Path, steps: int = 12, **train: Any) -> Recipe:
    settings = dict(
        tokens=steps * BATCH * LENGTH, sequence_length=LENGTH, batch_tokens=BATCH * LENGTH, micro_batch_size=2,
        precision="float32", learning_rate=3e-3, validate_every=4 * BATCH * LENGTH, validation_tokens=4 * LENGTH,
        checkpoint_every=3 * BATCH * LENGTH,
    )  # fmt: skip
    return validate(
        {
            "data": {"sources": [{"path": str(work / "text.jsonl")}], "held_out": 0.1},
            "convert": {"calibration": {"tokens": 1000}},
            "train": settings | train,
        }
    )


def uptrain(work: Path, teacher: Path, out: Path, settings: Recipe, **options: Any) -> dict[str, Any]:
    folder = TrainingFolder(out, out / "model")
    return loop.uptrain(work / "converted", teacher, folder, settings, Team("cpu"), **options).to_json()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    varying = {"seconds", "tokens_per_second", "peak_memory_bytes"}
    return [{k: v for k, v in row.items() if k not in varying} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights bit for bit, and metrics.jsonl but for times and memory."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert without_times(read_rows(one / "metrics.jsonl")) == without_times(read_rows(other / "metrics.jsonl"))


class StopAtOnce(StopRequest):
    """As if the user pressed Ctrl-C during the first step."""

    def __enter__(self) -> "StopAtOnce":
        super().__enter__()
        signal.raise_signal(signal.SIGTERM)
        return self


@pytest.fixture(scope="module")
def uninterrupted(work: Path, tiny_llama: Path) -> tuple[Path, dict[str, Any]]:
    return work / "whole", uptrain(work, tiny_llama, work / "whole", recipe(work))


def test_distillation_recovers_and_the_result_loads(
    work: Path, tiny_llama: Path, uninterrupted: tuple[Path, dict[str, Any]]
) -> None:
    folder, result = uninterrupted
    assert result["tokens"] == 12 * BATCH * LENGTH and result["steps"] == 12
    assert result["loss"] < 0.8 * result["first_loss"]
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert [row["tokens"] for row in result["validation"]] == [n * BATCH * LENGTH for n in (0, 4, 8, 12)]
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"} <= rows[1].keys()
    model = load_model(folder / "model", dtype=torch.float32, device="cpu")
    assert model.config.kv_source_layers == [0, 0, 2, 2, 4, 4]
    before = load_file(work / "converted" / "model.safetensors")
    assert before.keys() == weights(folder).keys()
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(folder).items())


def test_cross_entropy_learns_the_text(work: Path, tiny_llama: Path, tmp_path: Path) -> None:
    settings = recipe(work, steps=40, loss="cross_entropy", learning_rate=1e-2, validate_every=0, checkpoint_every=0)
    result = uptrain(work, tiny_llama, tmp_path, settings)
    first, last = (row["validation_perplexity"] for row in result["validation"])
    assert result["loss"] < 0.6 * result["first_loss"] and last < 0.2 * first
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1  # only the one at the end


def test_the_loss_reported_is_the_models_own(work: Path, tiny_llama: Path) -> None:
    """The first step's loss against transformers' logits: next-token cross-entropy, and KL to the source model."""
    student = load_model(work / "converted", dtype=torch.float32)
    teacher = load_model(tiny_llama, dtype=torch.float32)
    for loss in ("cross_entropy", "distill"):
        trainer = set_up(work / "converted", tiny_llama, recipe(work, loss=loss), "cpu")
        mine = gradients(trainer, 0, BATCH)[..., 0].sum()
        ids = torch.from_numpy(trainer.sequences.rows(BATCH))
        with torch.no_grad():
            logits, target = student(ids).logits[:, :-1], teacher(ids).logits[:, :-1]
        log_p, log_q = logits.log_softmax(-1), target.log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        cross_entropy = -log_p.gather(-1, ids[:, 1:, None]).mean()
        torch.testing.assert_close(mine, kl if loss == "distill" else cross_entropy, rtol=1e-4, atol=1e-5)


def test_with_document_masking_the_loss_is_that_of_the_documents_alone(
    work: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    rows = [{"text": "some words"[: 3 + i % 7] + f" {i}"} for i in range(300)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = recipe(tmp_path, document_masking=True, loss="cross_entropy")
    trainer = set_up(work / "converted", tiny_llama, settings, "cpu")
    mine = gradients(trainer, 0, BATCH)[..., 0].sum()
    student = load_model(work / "converted", dtype=torch.float32)
    losses: list[torch.Tensor] = []
    for row in trainer.sequences.rows(BATCH):
        for document in torch.from_numpy(row).tensor_split(torch.from_numpy(row[:-1] == 1).nonzero().flatten() + 1):
            with torch.no_grad():
                log_p = student(document[None]).logits[0, :-1].log_softmax(-1)
            losses.extend(-log_p.gather(-1, document[1:, None]).flatten())
    assert len(losses) < 0.95 * BATCH * (LENGTH - 1)
    torch.testing.assert_close(mine, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def test_documents_that_attention_would_not_keep_apart_are_refused_before_training(work: Path, tmp_path: Path) -> None:
    """GPT-OSS of transformers 5.23 does not tell its mask of the positions."""
    model = save_tiny("gpt_oss", tmp_path / "model")
    ids, positions = torch.arange(2, 26)[None], torch.arange(12).repeat(2)[None]
    with torch.no_grad():
        loaded = load_model(model, dtype=torch.float32)
        apart = torch.allclose(
            hidden_states(loaded, ids, positions)[:, 12:], hidden_states(loaded, ids[:, 12:]), atol=1e-3
        )
    settings = recipe(work, document_masking=True, loss="cross_entropy")
    if apart:
        set_up(model, model, settings, "cpu")
    else:
        with pytest.raises(InputError, match="document_masking does nothing to models of type 'gpt_oss'"):
            set_up(model, model, settings, "cpu")


def test_a_source_distilled_from_itself_is_at_its_goal_whatever_its_dropout(work: Path, tmp_path: Path) -> None:
    model = save_tiny("starcoder2", tmp_path / "model", residual_dropout=0.3, attention_dropout=0.3)
    trainer = set_up(model, model, recipe(work, hidden_weight=0), "cpu")
    assert trainer.student.training and gradients(trainer, 0, BATCH)[..., 0].sum() < 1e-5


def grads(work: Path, teacher: Path, **train: Any) -> dict[str, torch.Tensor]:
    trainer = set_up(work / "converted", teacher, recipe(work, **train), "cpu")
    gradients(trainer, 0, BATCH)
    return {name: p.grad for name, p in trainer.parameters.items() if p.grad is not None}


@pytest.mark.parametrize(
    "changed", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"activation_checkpointing": True}]
)
@pytest.mark.parametrize("loss", ["distill", "cross_entropy"])
def test_gradients_do_not_depend_on_how_they_are_computed(
    work: Path, tiny_llama: Path, loss: str, changed: dict[str, Any]
) -> None:
    reference = grads(work, tiny_llama, loss=loss, micro_batch_size=BATCH)
    other = grads(work, tiny_llama, loss=loss, **({"micro_batch_size": BATCH} | changed))
    assert reference.keys() == other.keys() and len(reference) > 40
    for name, gradient in reference.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_bfloat16_trains_float32_weights(work: Path, tiny_llama: Path, tmp_path: Path) -> None:
    result = uptrain(work, tiny_llama, tmp_path, recipe(work, precision="bfloat16"))
    assert result["precision"] == "bfloat16" and result["loss"] < 0.8 * result["first_loss"]
    assert all(
        t.dtype == torch.float32 for t in load_file(next(tmp_path.glob("checkpoints/*/model-*.safetensors"))).values()
    )


def test_stopping_after_every_step_changes_nothing(
    work: Path,
    tiny_llama: Path,
    tmp_path: Path,
    uninterrupted: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "StopRequest", StopAtOnce)
    for _ in range(11):
        with pytest.raises(Interrupted) as caught:
            uptrain(work, tiny_llama, tmp_path, recipe(work), resume_command="the-same-command")
        assert "the-same-command" in caught.value.fix
        assert len(list((tmp_path / "checkpoints").iterdir())) <= 2
    result = uptrain(work, tiny_llama, tmp_path, recipe(work))
    assert_same_run(tmp_path, uninterrupted[0])
    assert result["first_loss"] == uninterrupted[1]["first_loss"]


def test_dropout_resumes_exactly_too(
    work: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(work / "converted", tmp_path / "converted")
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    (tmp_path / "converted" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    settings = recipe(work, steps=4)
    uptrain(tmp_path, tiny_llama, tmp_path / "whole", settings)
    for _ in range(3):
        interrupted_run(tmp_path, tiny_llama, tmp_path / "parts", monkeypatch, settings)
    uptrain(tmp_path, tiny_llama, tmp_path / "parts", settings)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def interrupted_run(work: Path, teacher: Path, out: Path, patch: pytest.MonkeyPatch, settings: Recipe) -> None:
    with patch.context() as inner, pytest.raises(Interrupted):
        inner.setattr(loop, "StopRequest", StopAtOnce)
        uptrain(work, teacher, out, settings)


def test_a_changed_recipe_is_refused_and_fresh_starts_over(
    work: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_run(work, tiny_llama, tmp_path, monkeypatch, recipe(work))
    with pytest.raises(TrainingError, match=r"train.learning_rate: 0.003 -> 0.001"):
        uptrain(work, tiny_llama, tmp_path, recipe(work, learning_rate=1e-3))
    (tmp_path / "metrics.jsonl").read_text()  # untouched by the refusal
    with pytest.raises(TrainingError, match="data: "):
        other = recipe(work)
        other.data.held_out = 0.3
        uptrain(work, tiny_llama, tmp_path, other)
    result = uptrain(work, tiny_llama, tmp_path, recipe(work, learning_rate=1e-3), fresh=True)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl") if "loss" in row] == list(range(1, 13))
    assert result["steps"] == 12


def test_a_checkpoint_of_another_loss_is_refused_by_name(
    work: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one from before the distance of the streams was relative to the longer of both."""
    settings = recipe(work, hidden_weight=1.0)
    with monkeypatch.context() as before:
        before.setattr("cla_convert.training.trainer.STREAM_DISTANCE", None)
        interrupted_run(work, tiny_llama, tmp_path, monkeypatch, settings)
    with pytest.raises(TrainingError, match=r"(?s)train.hidden_distance: .*No setting") as told:
        uptrain(work, tiny_llama, tmp_path, settings)
    assert told.value.fix.startswith("Accept it with --allow-change train.hidden_distance")
    result = uptrain(work, tiny_llama, tmp_path, settings, allow_changes=["train.hidden_distance"])
    assert [change["name"] for one in result["changes"] for change in one["changed"]] == ["train.hidden_distance"]


def test_how_often_to_save_may_change_on_resume(
    work: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: tuple[Path, dict[str, Any]],
) -> None:
    interrupted_run(work, tiny_llama, tmp_path, monkeypatch, recipe(work))
    uptrain(work, tiny_llama, tmp_path, recipe(work, checkpoint_every=0, keep_checkpoints=5))
    assert_same_run(tmp_path, uninterrupted[0])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run(
    work: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    calls, healthy = 0, Objective.__call__

    def sick(self: Objective, student: Any, *batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1  # two micro-batches a step: the fourth is the second of step 2
        factor = float("nan") if calls == 4 else 1.0
        loss, record = healthy(self, student, *batch)
        return loss * factor, record * factor

    # An absurd learning rate leaves weights whose loss is finite (the norms see to that) and whose gradient is not.
    settings = recipe(work, warmup=0, checkpoint_every=BATCH * LENGTH, loss="cross_entropy",
                      learning_rate=1e30 if what == "gradient" else 1e-3)  # fmt: skip
    if what == "loss":
        monkeypatch.setattr(Objective, "__call__", sick)
    with pytest.raises(TrainingError) as caught:
        uptrain(work, tiny_llama, tmp_path, settings)
    sequences = "6 to 7" if what == "loss" else "4 to 7"
    assert caught.value.what == f"The {what} is not finite at step 2, sequences {sequences}"
    assert "There is no good checkpoint yet." in caught.value.why
    assert "step-00000001 may hold what failed" in caught.value.why
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (tmp_path / "model").exists()


def test_a_torn_checkpoint_is_passed_over(
    work: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: tuple[Path, Any]
) -> None:
    for _ in range(2):
        interrupted_run(work, tiny_llama, tmp_path, monkeypatch, recipe(work))
    torn = tmp_path / "checkpoints" / "step-00000002" / "exp_avg-00001-of-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    (tmp_path / "checkpoints" / ".tmp-1").mkdir()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tok')  # cut short by a kill
    uptrain(work, tiny_llama, tmp_path, recipe(work))
    assert_same_run(tmp_path, uninterrupted[0])
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_an_odd_budget_is_met_exactly(work: Path, tiny_llama: Path, tmp_path: Path) -> None:
    settings = recipe(work, tokens=LENGTH * 10 + 5, batch_tokens=LENGTH * 4, validate_every=0)
    result = uptrain(work, tiny_llama, tmp_path, settings)
    assert result["tokens"] == LENGTH * 10 and result["steps"] == 3


def test_a_folder_that_is_not_ours_is_refused_before_training(work: Path, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="will not be replaced"):
        uptrain(work, tiny_llama, tmp_path, recipe(work))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_ruined_weights_are_neither_saved_nor_published(work: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """The loss is measured before the update: after the last one only the weights tell."""
    settings = recipe(work, steps=1, warmup=0, loss="cross_entropy", learning_rate=3e38)
    with pytest.raises(TrainingError, match="weights are not finite after step 1: the model is not published"):
        uptrain(work, tiny_llama, tmp_path, settings)
    assert not (tmp_path / "model").exists() and not list((tmp_path / "checkpoints").glob("step-*"))


def test_a_model_without_a_validation_is_not_published(work: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Its weights are finite; what they say is not. Trying again does not publish it either."""
    settings = recipe(work, steps=1, warmup=0, learning_rate=30.0)
    for _ in range(2):
        with pytest.raises(TrainingError, match="validation perplexity is not finite after step 1"):
            uptrain(work, tiny_llama, tmp_path, settings)
        assert not (tmp_path / "model").exists()


def test_training_that_made_it_worse_says_so(
    work: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = uptrain(work, tiny_llama, tmp_path, recipe(work, steps=1, warmup=0, learning_rate=4.0))
    first, last = (result["validation"][i]["validation_perplexity"] for i in (0, -1))
    printed = capsys.readouterr().err
    assert last > first and f"validation perplexity {first:.4g} -> {last:.4g}" in printed
    assert "the validation perplexity rose" in printed


def test_too_little_memory_is_said_before_a_weight_is_read(
    work: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_batch, "device_memory", lambda _: 500_000_000)
    monkeypatch.setattr(
        "cla_convert.models.checkpoint.Checkpoint.read", lambda *_, **__: pytest.fail("a weight was read")
    )
    with pytest.raises(InputError, match="Training needs about .* the machine has 476.8 MiB"):
        uptrain(work, tiny_llama, tmp_path, recipe(work))
    assert not (tmp_path / "model").exists()


def test_memory_that_runs_out_keeps_the_last_checkpoint(
    work: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, usual = 0, Objective.__call__

    def hungry(self: Objective, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 * 7:  # two passes a step
            torch.empty(2**60, dtype=torch.uint8)
        return usual(self, *args)

    monkeypatch.setattr(Objective, "__call__", hungry)
    with pytest.raises(TrainingError) as error:
        uptrain(work, tiny_llama, tmp_path, recipe(work, keep_checkpoints=1))
    assert error.value.what == "Memory ran out with 2 sequences a pass"
    assert str(tmp_path / "checkpoints" / "step-00000006") in error.value.why
    assert "train.micro_batch_size=1 (" in error.value.fix
    monkeypatch.undo()
    resumed = recipe(work, keep_checkpoints=1, micro_batch_size=1)
    uptrain(work, tiny_llama, tmp_path, resumed, allow_changes=["train.micro_batch_size"])
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["step"] == 12
