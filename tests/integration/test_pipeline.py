"""`cla-convert run` as a whole on a tiny model: stop, resume, refuse, start anew, lose nothing."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from cla_convert import pipeline
from cla_convert.errors import InputError, UsageError
from cla_convert.files import alone_in
from cla_convert.models.writer import MANIFEST
from cla_convert.recipe_file import load_recipe
from cla_convert.recipes import find_recipe
from cla_convert.run_folder import RunFolder
from cla_convert.same_recipe import check_same_recipe
from cla_convert.training import micro_batch
from tests.launch import cla
from tests.unit.test_wholes import save_whole

SMALL = [
    "train.tokens=4k", "train.sequence_length=64", "train.batch_tokens=256", "train.validation_tokens=256",
    "train.precision=float32", "convert.init=mean", "eval.limit=1", "eval.tasks=[openbookqa]", "eval.max_length=512",
]  # fmt: skip


def line(model, out, *more) -> list[str]:
    sets = [word for value in [f"source.model={model}", *SMALL] for word in ("--set", value)]
    return ["run", "demo", "--out", str(out), *sets, *more]


def test_ctrl_c_saves_and_the_printed_command_resumes(tmp_path, tiny_llama):
    arguments = line(tiny_llama, tmp_path / "run", "--overwrite", "--set", "train.tokens=60k")
    process = subprocess.Popen(
        [sys.executable, "-m", "cla_convert.cli", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("grad_norm") > 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=250)
    assert process.returncode == 130, stderr
    resume = stderr.strip().splitlines()[-1]
    assert "cla-convert run demo" in resume and "--overwrite" not in resume  # which would throw away what was saved
    before = [json.loads(row) for row in metrics.read_text().splitlines()]

    arguments.remove("--overwrite")
    done = cla(*arguments)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    after = [json.loads(row) for row in metrics.read_text().splitlines()]
    losses = [row["loss"] for row in before if "loss" in row]
    assert [row["loss"] for row in after if "loss" in row][: len(losses)] == losses  # nothing was done twice
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["train"]["tokens"] == 59968  # whole sequences of 64 within 60k
    for until in ("eval", "report"):
        judged = cla(*arguments, "--until", until, "--gate-strict")  # one row cannot tell
        assert judged.returncode == 4 and "error: The quality gate failed" in judged.stderr, judged.stderr


def test_a_run_that_cannot_start_costs_nothing(tmp_path, tiny_llama):
    out = tmp_path / "run"
    assert cla(*line(tiny_llama, out), "--until", "convert").returncode == 0
    made = (out / "converted" / "model.safetensors").stat().st_mtime_ns
    for wrong in ("eval.tasks=[no-such-task]", "data.sources=[{path: nowhere}]", f"source.model={tiny_llama}x"):
        done = cla(*line(tiny_llama, out, "--overwrite", "--set", wrong))
        assert done.returncode in (2, 3) and "Traceback" not in done.stderr, done.stderr
        assert (out / "converted" / "model.safetensors").stat().st_mtime_ns == made
    assert cla(*line(tiny_llama, out), "--until", "convert").returncode == 0  # and the old line still continues


def test_training_that_will_not_fit_is_refused_in_the_plan(tmp_path, tiny_llama, monkeypatch):
    sets = [f"source.model={tiny_llama}", *SMALL, "device=cpu"]
    recipe = load_recipe(find_recipe("demo"), sets).recipe
    monkeypatch.setattr(micro_batch, "device_memory", lambda _: 500_000_000)
    with pytest.raises(InputError, match="Training needs about"):
        pipeline.run(recipe, tmp_path / "run")
    assert not any((tmp_path / "run" / name).exists() for name in ("plan.json", "converted", "checkpoints"))
    (tmp_path / "run" / "uptrained").mkdir()  # trained, on a larger machine
    pipeline.run(recipe, tmp_path / "run", until="plan")
    untrained = load_recipe(find_recipe("demo"), [*sets, "train.tokens=0"]).recipe
    pipeline.run(untrained, tmp_path / "other", until="plan")


def test_a_map_that_was_measured_is_not_measured_again_on_other_text(tmp_path, tiny_llama, capsys):
    """It belongs to the model that lies there: a second choice costs minutes, and may be another map."""
    sets = [
        f"source.model={tiny_llama}", *SMALL, "device=cpu", "convert.init=calibrated", "convert.sharing=auto",
        "convert.calibration={tokens: 768, sequence_length: 64, steps: 1}",
    ]  # fmt: skip
    recipe = load_recipe(find_recipe("demo"), [*sets, "train.tokens=0"]).recipe
    pipeline.run(recipe, tmp_path / "run", until="convert")
    planned = (tmp_path / "run" / "plan.json").read_text()
    said = capsys.readouterr().err.count("calibrating on")
    assert said == 2 and '"auto"' in planned  # to choose, and to convert
    text = tmp_path / "other.jsonl"
    text.write_text("".join(json.dumps({"text": f"{number} " * 300}) + "\n" for number in range(40)))
    longer = load_recipe(find_recipe("demo"), [*sets, f"data.sources=[{{path: {text}}}]"]).recipe
    changes = {"overwrite": False, "allow_changes": ["train", "data"]}
    dry = pipeline.dry_run(longer, tmp_path / "run", **changes)
    pipeline.run(longer, tmp_path / "run", until="plan", allow_changes=changes["allow_changes"])
    assert "calibrating on" not in capsys.readouterr().err
    assert (tmp_path / "run" / "plan.json").read_text() == planned
    assert json.loads(json.dumps(dry.to_json())) == json.loads(planned)
    pipeline.dry_run(longer, tmp_path / "run", overwrite=True, allow_changes=[])
    assert "calibrating on" in capsys.readouterr().err


def test_a_run_folder_is_one_process_s(tmp_path, tiny_llama):
    with alone_in(tmp_path / "run"):
        done = cla(*line(tiny_llama, tmp_path / "run"), "--until", "plan")
    assert done.returncode == 3 and f"Another process is at work in {tmp_path / 'run'}" in done.stderr


def test_a_path_that_cannot_be_is_no_bug(tmp_path, tiny_llama):
    done = cla(*line(tiny_llama, tmp_path / ("x" * 300)), "--until", "plan")
    assert done.returncode == 3 and "The name is longer than the system allows" in done.stderr
    assert "Traceback" not in done.stderr


def test_only_a_run_folder_is_ever_cleared(tmp_path):
    recipe = load_recipe(None).recipe
    for name in ("recipe.yaml", "package.json", "photo.png"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="holds no run"):
        check_same_recipe(RunFolder(tmp_path), recipe, overwrite=True)
    (tmp_path / "environment.json").write_text("{}")
    RunFolder(tmp_path).clear()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["package.json", "photo.png"]


@pytest.mark.parametrize("setting", ["source.model={}", "train.teacher={}", "data.sources=[{{path: {}/x.txt}}]"])
def test_starting_anew_removes_nothing_that_is_read(tmp_path, setting):
    folder = RunFolder(tmp_path)
    (folder.control.model).mkdir(parents=True)
    (folder.control.model / "x.txt").write_text("precious")
    for name in ("recipe.yaml", "environment.json"):
        (tmp_path / name).write_text("{}")
    recipe = load_recipe(None, [setting.format(folder.control.model)]).recipe
    with pytest.raises(UsageError, match="would be removed before it is read"):
        check_same_recipe(folder, recipe, overwrite=True)
    check_same_recipe(RunFolder(tmp_path), load_recipe(None, ["source.model=org/model"]).recipe, overwrite=True)


def test_a_dry_run_plans_and_writes_nothing(tmp_path, tiny_llama):
    done = cla(*line(tiny_llama, tmp_path / "run"), "--dry-run", "-q")
    assert done.returncode == 0 and "[0] [1 ← 2] [3 ← 4] [5]" in done.stdout, done.stderr
    assert not (tmp_path / "run").exists()
    assert "done in" not in done.stderr and "source.model" not in done.stderr  # quiet: warnings at most


def test_a_run_ends_with_a_few_lines_and_says_what_was_asked_for(tmp_path, tiny_llama):
    out = tmp_path / "run"
    done = cla(*line(tiny_llama, out), "--set", "train.batch_tokens=2048")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) <= 16 and lines[0].startswith("Verdict")
    assert all(len(row) <= 80 for row in lines if "/" not in row)
    assert any("768 -> 512 bytes per token (1.50x smaller)" in row for row in lines)
    assert str(out / "uptrained") in done.stdout and str(out / "report.html") in done.stdout and "Next" in done.stdout
    assert "2 optimiser steps are few" in done.stderr and "train.batch_tokens=64" in done.stderr
    assert "train.tokens" in done.stderr and "train.betas" not in done.stderr  # what differs from the defaults
    again = cla(*line(tiny_llama, out), "--set", "train.batch_tokens=2048", "--set", "eval.limit=2")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("openbookqa: measured before") == 3  # at every point, and nothing is trained again
    assert f"found {out / 'uptrained'}" in again.stderr


def test_uptrain_finds_the_teacher_that_the_manifest_names(tmp_path, tiny_llama):
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    assert cla("convert", source, tmp_path / "c", "--init", "mean").returncode == 0
    small = [word for value in [*SMALL[:5], "device=cpu"] for word in ("--set", value)]
    done = cla("uptrain", tmp_path / "c", tmp_path / "u", *small, cwd=tmp_path / "c")
    assert done.returncode == 0 and f"the teacher is {source}" in done.stderr, done.stderr
    manifest = tmp_path / "c" / MANIFEST  # as it was written when a revision of what is here was passed over
    made = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(made | {"source": made["source"] | {"revision": "main"}}))
    done = cla("uptrain", tmp_path / "c", tmp_path / "w", *small)
    assert done.returncode == 0 and f"the teacher is {source}" in done.stderr, done.stderr
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    done = cla("uptrain", tmp_path / "c", tmp_path / "v", *small)
    assert done.returncode == 2 and "has changed since" in done.stderr and "error: No teacher" in done.stderr


@pytest.mark.parametrize("kind", ["text_only", "pickled"])
def test_the_teacher_is_found_however_the_source_was_read(tmp_path, tiny_llama, kind):
    source, options = tmp_path / "source", {"text_only": ["--text-only"], "pickled": ["--allow-pickle"]}[kind]
    if kind == "text_only":
        save_whole("gemma3", source)
    else:
        torch.save(load_file(shutil.copytree(tiny_llama, source) / "model.safetensors"), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    done = cla("convert", source, tmp_path / "c", "--init", "mean", *options)
    assert done.returncode == 0, done.stderr
    small = [word for value in [*SMALL[:5], "device=cpu"] for word in ("--set", value)]
    if kind == "pickled":
        done = cla("uptrain", tmp_path / "c", tmp_path / "u", *small)
        assert done.returncode == 2 and "are pickled" in done.stderr and "or --allow-pickle" in done.stderr, done.stderr
        small += options
    done = cla("uptrain", tmp_path / "c", tmp_path / "u", *small)
    assert done.returncode == 0 and f"the teacher is {source}" in done.stderr, done.stderr
    assert (kind == "pickled") == (f"--beside {source} --allow-pickle" in done.stderr)


def test_every_verb_that_refuses_pickled_weights_can_accept_them(tmp_path, tiny_llama):
    source, out = shutil.copytree(tiny_llama, tmp_path / "source"), tmp_path / "c"
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert cla("convert", source, out, "--init", "mean", "--allow-pickle").returncode == 0
    lines: list[tuple] = [
        ("inspect", source),
        ("inspect", source, "--training"),
        (*line(source, tmp_path / "run"), "--dry-run"),
        ("bench", source, out, "--memory", "1MB", "--batch-sizes", 1, "--prompt", 4, "--new", 2, "--device", "cpu"),
        ("verify", out, "--cache", "--beside", source),
        ("chat", out, "--beside", source, "--device", "cpu"),
    ]
    for words in lines:
        refused, done = cla(*words), cla(*words, "--allow-pickle")
        assert refused.returncode == 3 and "--allow-pickle" in refused.stderr, (words, refused.stderr)
        assert done.returncode == 0, (words, done.stderr)
