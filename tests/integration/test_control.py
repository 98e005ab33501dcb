"""`train.control`: the source model uptrained on the same tokens, so that the report can tell CLA from the data."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cla_convert.errors import InputError
from cla_convert.models.export import load_model
from cla_convert.pipeline import run
from cla_convert.recipe import Recipe
from cla_convert.recipe_file import load_recipe
from cla_convert.report.report import build_report

SMALL = [
    "train.tokens=1k", "train.sequence_length=64", "train.batch_tokens=256", "train.validation_tokens=256",
    "train.precision=float32", "convert.init=mean", "eval.limit=2", "eval.tasks=[openbookqa]", "eval.max_length=512",
    "train.loss=cross_entropy", "device=cpu",
]  # fmt: skip


def do(model: Path, out: Path, *sets: str, until: str = "report") -> Any:
    recipe = load_recipe(None, [f"source.model={model}", *SMALL, *sets]).recipe
    return run(recipe, out, until=until)


def test_a_control_is_trained_evaluated_and_reported(tmp_path: Path, tiny_llama: Path):
    out = tmp_path / "run"
    do(tiny_llama, out, until="uptrain")
    weights = out / "uptrained" / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert not (out / "control").exists()
    report = do(tiny_llama, out, "train.control=true")  # asked for later: nothing else is done again
    assert weights.stat().st_mtime_ns == made

    trained, control = (json.loads((out / name / "train.json").read_text()) for name in (".", "control"))
    assert control["data_digest"] == trained["data_digest"]
    assert control["tokens"] == trained["tokens"] and control["objective"] == "cross_entropy"
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(out / "control/uptrained/model.safetensors")
    assert before.keys() == after.keys() and not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert not hasattr(load_model(out / "control" / "uptrained").config, "kv_source_layers")  # a plain Llama still

    results = json.loads((out / "eval" / "control" / "results.json").read_text())
    row = report["tasks"]["openbookqa"]["acc"]
    assert row["control"] == results["tasks"]["openbookqa"]["acc"]
    assert row["cla_cost"]["delta"] == pytest.approx(row["after"] - row["control"])
    held_out = report["perplexity"]["held_out"]
    assert held_out["control"] < held_out["before"]  # cross-entropy learns the text: after - before would hide the cost
    assert held_out["cla_cost_relative"] == pytest.approx(held_out["after"] / held_out["control"] - 1)
    assert report["control"]["statement"].startswith("CLA cost = after - control: mean accuracy")
    text = (out / "report.md").read_text()
    assert (
        "| control, % |" in text and "| CLA cost, points [95% CI] |" in text and report["control"]["statement"] in text
    )


def test_distilling_the_source_from_itself_is_not_done(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "run"
    settings = "train.loss=distill", "train.control=true"
    do(tiny_llama, out, *settings, until="uptrain")
    assert "the control is the source" in capsys.readouterr().err
    assert not (out / "control").exists()


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"loss": "cross_entropy"}, True),
        ({"loss": "distill"}, False),
        ({"loss": "distill", "weight_decay": 0.1}, True),  # decay moves the source away from itself
        ({"loss": "cross_entropy", "tokens": 0}, False),
        ({"loss": "cross_entropy", "control": False}, False),
    ],
)
def test_when_a_control_is_needed(settings: dict, needed: bool):
    recipe = Recipe.model_validate({"train": {"tokens": 10_000, "control": True} | settings})
    assert recipe.train.needs_control is needed


@pytest.mark.parametrize("settings", [{"parameters": "shared"}, {"learning_rates": {"shared": 1e-3}}], ids=str)
def test_a_control_that_could_not_be_trained_alike_is_refused(settings: dict):
    """No layer of the source shares."""
    train = {"tokens": 10_000, "loss": "cross_entropy", "control": True} | settings
    with pytest.raises(ValueError, match="would not train the source as the converted model"):
        Recipe.model_validate({"train": train})
    Recipe.model_validate({"train": train | {"control": False}})


def test_a_control_of_another_training_is_made_anew(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture):
    out, control = tmp_path / "run", "train.control=true"
    do(tiny_llama, out, control)
    shutil.rmtree(out / "uptrained")
    (out / "train.json").unlink()
    recipe = load_recipe(None, [f"source.model={tiny_llama}", *SMALL, control, "train.temperature=2"]).recipe
    kept = out / "aside"
    (out / "control").rename(kept)
    run(recipe, out, until="uptrain", allow_changes=["train"])
    shutil.rmtree(out / "control")
    kept.rename(out / "control")
    capsys.readouterr()

    assert "THE CONTROL WAS NOT TRAINED ALIKE: train.temperature differ" in caveats(out)
    run(recipe, out)
    assert "was trained otherwise (train.temperature): it is made anew" in capsys.readouterr().err
    made = json.loads((out / "control" / "uptrained" / "cla_manifest.json").read_text())["uptraining"]
    assert made["train.temperature"] == 2
    assert "TRAINED ALIKE" not in caveats(out)


def test_a_control_is_not_trained_on_other_text(tmp_path: Path, tiny_llama: Path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Document {n} has {n * n} words to say." * 20 for n in range(60)))
    data = f"data.sources=[{{path: {text}}}]"
    out = tmp_path / "run"
    do(tiny_llama, out, data, until="uptrain")
    text.write_text(text.read_text().replace("words", "other"))
    with pytest.raises(InputError, match="cannot be trained on the text of the uptrained model"):
        do(tiny_llama, out, data, "train.control=true", until="uptrain")
    assert not (out / "control" / "uptrained").exists()


def caveats(out: Path) -> str:
    return "\n".join(build_report(out)["caveats"])
