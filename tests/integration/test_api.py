"""docs/python-api.md, run as it stands on a tiny model; importing the package stays light."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import cla_convert
from cla_convert import Recipe, RunFolder, convert, evaluate, plan, run, uptrain, write_report
from cla_convert.cli import app
from cla_convert.errors import InputError, UsageError
from cla_convert.stages.evaluate import measure_cache
from tests.conftest import save_tiny_llama

PAGE = Path(cla_convert.__file__).parent.parent / "docs" / "python-api.md"


def tiny(recipe: dict[str, Any], model: Path, work: Path) -> dict[str, Any]:
    """The recipe of the page for a tiny model and a few tokens."""
    rows = [{"text": f"Document {i}: " + "the cat sat on the mat. " * 8} for i in range(60)]
    (work / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = {"sequence_length": 64, "batch_tokens": 256, "validation_tokens": 256, "precision": "float32"}
    return {
        "source": {"model": str(model)},
        "convert": recipe["convert"] | {"calibration": {"tokens": 1024, "sequence_length": 64, "steps": 1}},
        "data": {"sources": [{"path": str(work / "text.jsonl")}], "held_out": 0.2},
        "train": small | {"tokens": 1024},
        "eval": {"tasks": ["wikitext"], "limit": 1, "max_length": 256, "domain_tokens": 64},
        "device": "cpu",
    }


def test_the_example_runs(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    validate = Recipe.model_validate
    monkeypatch.chdir(tmp_path)
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    monkeypatch.setattr(Recipe, "model_validate", lambda recipe: validate(tiny(recipe, source, tmp_path)))
    found: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), found)
    assert "perplexity" in found["points"]["after"].to_json()["texts"]["held_out"]
    printed = capsys.readouterr().out
    assert "768 -> 512" in printed and "1024" in printed and found["report"]["verdict"] in printed
    assert (tmp_path / "runs" / "mine" / "report.html").exists()
    # The stages find what they made, and the command line goes on with it.
    folder, weights = RunFolder("runs/mine"), Path("runs/mine/uptrained/model.safetensors")
    made = weights.stat().st_mtime_ns
    assert convert(found["recipe"], folder) == found["converted"]
    assert uptrain(found["recipe"], folder).to_json() == folder.training.result.read().to_json()  # type: ignore[union-attr]
    run(found["recipe"], "runs/mine")
    assert weights.stat().st_mtime_ns == made and load_file(weights)
    # Measured again: the cache of another model. Refused: a model of other weights than the source has now.
    cache = folder.evaluation.point("converted").kv_cache
    assert cache.write(cache.read().model_copy(update={"model_fingerprint": "another", "bytes_per_token": 1.0}))
    assert measure_cache(folder, "converted", folder.converted, "cpu").bytes_per_token == 512
    changed = save_tiny_llama(tmp_path / "changed", seed=1)
    shutil.copy(changed / "model.safetensors", source / "model.safetensors")
    with pytest.raises(InputError, match="made from other weights"):
        convert(found["recipe"], RunFolder("runs/mine"))


@pytest.mark.parametrize(
    ("init", "others"),
    [
        ("mean", ["--sharing", "cla3"]),
        ("mean", ["--init", "first"]),
        ("mean", ["--kv-heads", "1"]),
        ("mean", ["--dtype", "bfloat16"]),
        ("calibrated", ["--set", "convert.calibration.tokens=2k"]),
        ("calibrated", ["--set", "convert.calibration.steps=7"]),
        ("calibrated", []),  # the same again
    ],
)
def test_no_run_goes_on_with_a_conversion_that_took_the_place_of_its_own(
    tiny_llama: Path, tmp_path: Path, init: str, others: list[str]
) -> None:
    recipe = Recipe.model_validate(tiny({"convert": {"sharing": "cla2", "init": init}}, tiny_llama, tmp_path))
    folder = RunFolder(tmp_path / "run")
    made = convert(recipe, folder)
    own = ["--recipe", str(folder.recipe), "--overwrite"]
    app(["convert", str(tiny_llama), str(folder.converted), *own, *others], standalone_mode=False)
    said = " ".join(write_report(recipe, folder)["caveats"])
    assert ("NOT THE RUN'S OWN ANY MORE" in said) == bool(others)
    if not others:
        assert convert(recipe, folder) == made
        return
    with pytest.raises(InputError, match="is not the model that this run converted"):
        convert(recipe, folder)
    shutil.rmtree(folder.converted)  # as the refusal says
    assert convert(recipe, folder).kv_source_layers == made.kv_source_layers
    folder = RunFolder(folder.path.rename(tmp_path / "moved"))
    assert convert(recipe, folder) and "RUN'S OWN" not in " ".join(write_report(recipe, folder)["caveats"])


def test_no_run_goes_on_with_a_model_that_was_trained_from_another_conversion(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(tiny({"convert": {"sharing": "cla2", "init": "mean"}}, tiny_llama, tmp_path))
    folder = RunFolder(tmp_path / "run")
    convert(recipe, folder)
    first = shutil.copytree(folder.converted, tmp_path / "first")
    uptrain(recipe, folder)
    said = "BEGAN AS ANOTHER CONVERSION"
    assert uptrain(recipe, folder) and said not in " ".join(write_report(recipe, folder)["caveats"])
    shutil.rmtree(folder.converted)
    assert said not in " ".join(write_report(recipe, folder)["caveats"])  # nothing to compare with
    own = ["--recipe", str(folder.recipe), "--init", "first"]
    app(["convert", str(tiny_llama), str(folder.converted), *own], standalone_mode=False)
    assert said in " ".join(write_report(recipe, folder)["caveats"])
    with pytest.raises(InputError, match="trained from another model") as caught:
        uptrain(recipe, folder)
    assert f"remove {folder.training.model}" in caught.value.fix
    shutil.rmtree(folder.converted)
    shutil.copytree(first, folder.converted)
    assert uptrain(recipe, folder)


def test_no_record_of_a_conversion_outlives_its_model(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.model_validate(tiny({"convert": {"sharing": "cla2", "init": "mean"}}, tiny_llama, tmp_path))
    folder = RunFolder(tmp_path / "run")
    convert(recipe, folder)
    shutil.rmtree(folder.converted)
    with monkeypatch.context() as killed, pytest.raises(TypeError):  # behind the new model, before its record
        killed.setattr("cla_convert.report.model_card.write_first_card", None)
        convert(recipe, folder)
    assert folder.converted.exists() and not folder.convert.path.exists()
    assert convert(recipe, folder, overwrite=True) == convert(recipe, folder)


def test_no_stage_goes_on_under_another_recipe(tiny_llama: Path, tmp_path: Path) -> None:
    settings = tiny({"convert": {"sharing": "cla2", "init": "mean"}}, tiny_llama, tmp_path)
    recipe, folder = Recipe.model_validate(settings), RunFolder(tmp_path / "run")

    def other(section: str, **values: Any) -> Recipe:
        return Recipe.model_validate(settings | {section: settings[section] | values})

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.md").write_text("mine")
    with pytest.raises(UsageError, match="holds no run"):
        convert(recipe, RunFolder(tmp_path / "mine"))
    convert(recipe, folder)
    wider = other("convert", sharing="cla3")
    for stage in (convert, uptrain, evaluate, plan, write_report):
        with pytest.raises(UsageError, match="recipe") as caught:
            stage(wider, folder)  # type: ignore[operator]
        assert "convert.sharing: 'cla2' -> 'cla3'" in caught.value.why and "--" not in caught.value.fix
    longer = other("train", tokens=2048)
    with pytest.raises(UsageError) as caught:
        uptrain(longer, folder)
    assert "allow_changes=['train.tokens']" in caught.value.fix
    assert uptrain(longer, folder, allow_changes=["train.tokens"]).tokens == 2048
    with pytest.raises(UsageError, match="another recipe"):
        evaluate(recipe, folder)
    evaluate(longer, folder)
    fewer = longer.model_copy(update={"eval": longer.eval.model_copy(update={"domain_tokens": 0})})
    with pytest.raises(UsageError, match="results of another recipe") as caught:
        write_report(fewer, folder)
    assert "eval.domain_tokens: 64 -> 0" in caught.value.why
    evaluate(fewer, folder)  # what is measured may change at any time
    elsewhere = fewer.model_copy(update={"device": "auto"})
    assert write_report(elsewhere, folder)["settings"]["eval"]["domain_tokens"] == 0
    (one,) = json.loads(folder.environment.path.read_text())["invocations"]
    assert list(one["stages"]) == ["convert", "uptrain", "eval", "report"]


def test_several_processes_from_python(tiny_llama: Path, tmp_path: Path) -> None:
    settings = tiny({"convert": {"sharing": "cla2", "init": "mean"}}, tiny_llama, tmp_path)
    settings["train"] |= {"processes": 2}
    recipe, folder = Recipe.model_validate(settings), RunFolder(tmp_path / "run")
    convert(recipe, folder)
    trained = uptrain(recipe, folder)
    assert (trained.to_json()["processes"], trained.tokens) == (2, 1024)
    assert folder.training.result.path.parent == tmp_path / "run" and folder.training.model.exists()


def test_the_script_converts_trains_and_talks(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = tiny({"convert": {"sharing": "cla2"}}, tiny_llama, tmp_path)
    settings = [
        f"{section}.{key}={json.dumps(value)}"
        for section in ("convert", "train")
        for key, value in recipe[section].items()
    ]
    words = [
        str(tiny_llama),
        str(tmp_path / "text.jsonl"),
        str(tmp_path / "run"),
        "device=cpu",
        "eval.tasks=[openbookqa]",
        *settings,
    ]
    line = [sys.executable, str(PAGE.parent.parent / "examples" / "convert_and_chat.py"), *words]
    done = subprocess.run(line, input="Who sat on the mat?\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cache, training, *answers = done.stdout.splitlines()
    assert cache == "KV cache: 768 -> 384 bytes a token" and training.startswith("trained on 1024 tokens, loss ")
    assert [line for line in answers if line.startswith("[source] ")] and "[trained] " in done.stdout
    assert (tmp_path / "run" / "uptrained" / "model.safetensors").exists()
    refused = subprocess.run([*line[:4], str(tmp_path / "other"), "train.tokns=1"], capture_output=True, text=True)
    assert refused.returncode == 1 and "tokns" in refused.stderr and "Traceback" not in refused.stderr


def test_every_name_of_the_page_is_there_and_costs_nothing_before() -> None:
    names = set(re.findall(r"^\| `(\w+)\(", PAGE.read_text(), flags=re.MULTILINE))
    assert names and names <= set(cla_convert.__all__) == {"__version__", *cla_convert._PLACES}
    heavy = "{'torch', 'transformers', 'lm_eval', 'matplotlib'} & set(sys.modules)"
    lines = f"import sys; from cla_convert import {', '.join(cla_convert.__all__)}; print({heavy})"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()", done.stdout
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        cla_convert.convrt  # noqa: B018
