"""Uptraining in several processes: the same numbers as in one, one voice, and checkpoints that fit any number."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cla_convert.files import read_rows
from cla_convert.training import launch
from tests.conftest import save_tiny_llama
from tests.launch import finish, go_on, prepare, start, start_team, uptrain

STEPS = 4.2
"""Four steps of five sequences and one of a single one: nothing divides evenly, some processes have idle passes."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model whose head is not tied, and text."""
    folder = tmp_path_factory.mktemp("parallel")
    return prepare(folder, save_tiny_llama(folder / "source", tie_word_embeddings=False))


@pytest.fixture(scope="module")
def alone(work: Path) -> Path:
    """The run of one process, with all its checkpoints."""
    line = uptrain(work, work / "alone", steps=STEPS, **EVERY_STEP)
    assert finish(start(line, work / "alone.log")) == [0], (work / "alone.log").read_text()
    return work / "alone"


EVERY_STEP = {
    "checkpoint_every": 1,
    "keep_checkpoints": 9,
    "keep_checkpoints_after_success": True,
    "validate_every": 320,
}


def saved(out: Path, step: int, kind: str) -> dict[str, torch.Tensor]:
    """One kind of state of a checkpoint, put together from the files of all processes."""
    files = sorted((out.with_name(f"{out.name}.state") / "checkpoints" / f"step-{step:08d}").glob(f"{kind}-*"))
    parts = [load_file(file) for file in files]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and len(one) > 40
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()), msg=name)


def rows(out: Path) -> list[dict[str, Any]]:
    return read_rows(out.with_name(f"{out.name}.state") / "metrics.jsonl")


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {}),
        (2, {"gather": "step"}),
        (3, {"activation_checkpointing": True}),
        (3, {"activation_checkpointing": True, "gather": "step"}),
        (2, {"gather": "step", "shard_teacher": True}),
    ],
)
def test_the_numbers_are_those_of_one_process(
    work: Path, alone: Path, tmp_path: Path, size: int, options: dict[str, Any]
) -> None:
    """Gradients (the first moment after a step is a tenth of them), losses, norms, validation, weights."""
    out = tmp_path / "out"
    line = uptrain(work, out, steps=STEPS, **EVERY_STEP, **options)
    assert finish(*start_team(line, tmp_path / "log", size)) == [0] * size, (tmp_path / "log").read_text()
    assert ("gathered once a step" in (tmp_path / "log").read_text()) == ("gather" in options)
    for kind, step in (("exp_avg", 1), ("exp_avg", 5), ("model", 5)):
        assert_equal(saved(alone, step, kind), saved(out, step, kind))
    for mine, theirs in zip(rows(alone), rows(out), strict=True):
        for name in mine.keys() & {"step", "tokens", "loss", "lr", "grad_norm", "validation_perplexity"}:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5), (mine["step"], name)
    assert_equal(load_file(alone / "model.safetensors"), load_file(out / "model.safetensors"))


def test_bfloat16_is_that_of_one_process(work: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options: dict[str, Any] = {"steps": STEPS, "precision": "bfloat16", "validate_every": 0}
    codes = finish(
        start(uptrain(work, one, **options), tmp_path / "log1"),
        *start_team(uptrain(work, two, **options), tmp_path / "log2"),
    )
    assert codes == [0, 0, 0], (tmp_path / "log2").read_text()
    losses = [[row["loss"] for row in rows(out) if "loss" in row] for out in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)  # a step of Adam passes rounding on whole


def test_only_one_process_speaks_and_the_output_is_as_any_other(work: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    assert finish(*start_team(uptrain(work, out, steps=2), log)) == [0, 0], log.read_text()
    assert log.read_text().count("uptraining: 2 steps") == 1 and "2 x cpu" in log.read_text()
    assert log.read_text().splitlines().count(str(out)) == 1  # stdout: the result, once
    assert json.loads((tmp_path / "out.state" / "train.json").read_text())["processes"] == 2
    auto_map = json.loads((out / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_cla_llama.ClaLlamaForCausalLM"
    assert finish(start(["verify", out], tmp_path / "verify")) == [0], (tmp_path / "verify").read_text()


@pytest.mark.parametrize(("sizes", "gather"), [((2, 1), "layer"), ((1, 2), "layer"), ((3, 2), "step")])
def test_a_checkpoint_fits_any_number_of_processes(
    work: Path, alone: Path, tmp_path: Path, sizes: tuple[int, int], gather: str
) -> None:
    """The first ones are stopped half-way, others finish."""
    out, log, (before, after) = tmp_path / "out", tmp_path / "log", sizes
    line = uptrain(work, out, steps=STEPS, gather=gather, **EVERY_STEP)
    processes = start_team(line, log, before, pause_at=2) if before > 1 else [start(line, log, pause_at=2)]
    wait_for_step(processes, out, 2)
    for process in processes:
        os.kill(process.pid or 0, signal.SIGTERM)
    go_on(log)
    assert finish(*processes) == [130] * before, log.read_text()
    assert log.read_text().count("Everything is saved in") == 1
    done = max(row["step"] for row in rows(out))
    assert 2 <= done < 5
    processes = start_team(line, log, after) if after > 1 else [start(line, log)]
    assert finish(*processes) == [0] * after, log.read_text()
    assert f"processes: {before} -> {after}" in log.read_text() and "not bit-exact" in log.read_text()
    assert_equal(saved(alone, 5, "model"), saved(out, 5, "model"))
    losses = [[row["loss"] for row in rows(run) if "loss" in row] for run in (alone, out)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # the same text in the same order


def wait_for_step(processes: list[BaseProcess], out: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while max((row["step"] for row in rows(out)), default=0) < step and time.monotonic() < deadline:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.001)


def test_an_error_of_the_first_process_ends_all(work: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = start_team([*uptrain(work, tmp_path / "out", steps=2), "--set", "train.tokens=1"], log)
    assert finish(*processes)[0] == 2
    assert log.read_text().count("less than one sequence") == 1 and "Traceback" not in log.read_text()
    # Before they are connected: each finds out by itself, and one speaks.
    started = time.monotonic()
    assert finish(*start_team(["uptrain", tmp_path / "nothing", tmp_path / "out"], log)) == [3, 3]
    assert time.monotonic() - started < 240 and log.read_text().count("There is no folder") == 1


def test_an_error_of_another_process_is_told(work: Path, tmp_path: Path) -> None:
    """The disk is full for the second process only: both stop, one of them says why, nothing half-written stays."""
    log = tmp_path / "log"
    line = uptrain(work, tmp_path / "out", steps=2, checkpoint_every=1)
    assert finish(*start_team(line, log, file_limits=(0, 20_000))) == [3, 3], log.read_text()
    assert log.read_text().count("cannot be written to") == 1 and "File too large" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not list((tmp_path / "out.state" / "checkpoints").iterdir())


def wait_for_rows(process: subprocess.Popen[str], metrics: Path) -> None:
    deadline = time.monotonic() + 300
    while len(read_rows(metrics)) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)


def test_uptrain_under_torchrun_stops_and_resumes(work: Path, tmp_path: Path) -> None:
    """The real launcher: SIGTERM to it saves a checkpoint, and the same line goes on from there."""
    out, log = tmp_path / "out", tmp_path / "log"
    line = [str(word) for word in uptrain(work, out, steps=30)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "cla_convert"]
    process = subprocess.Popen([*torchrun, *line], stderr=subprocess.PIPE, text=True, env=os.environ)
    wait_for_rows(process, tmp_path / "out.state" / "metrics.jsonl")
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=250)
    assert process.returncode != 0
    assert stderr.count("Everything is saved in") == 1, stderr
    assert "fix: Resume with: torchrun --nproc-per-node 2 -m cla_convert uptrain" in stderr
    assert finish(*start_team(line, log)) == [0, 0], log.read_text()
    assert log.read_text().count("resuming from") == 1 and "not bit-exact" not in log.read_text()
    assert out.exists() and not (tmp_path / "out.state" / "checkpoints").exists()


def test_ctrl_c_ends_processes_that_have_not_met_yet(work: Path, tmp_path: Path) -> None:
    """A terminal sends it to all of them: some end before they can wait for the others."""
    line = ["run", str(work / "recipe.yaml"), "--out", str(tmp_path / "run"), "--set", "train.processes=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cla_convert", *line, "--set", "train.tokens=320"],
        stderr=subprocess.PIPE, text=True, env=os.environ, start_new_session=True,
    )  # fmt: skip
    assert process.stderr and any(said.startswith("[3/5]") for said in process.stderr)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=50)  # less than what those have to end who wait for one that has failed
    assert process.returncode == 130 and "cla-convert run" in stderr, stderr
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_whichever_process_fails_first_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_GRACE", 0.1)
    waits, fails = subprocess.Popen(["sleep", "60"]), subprocess.Popen(["false"])
    try:
        assert launch._wait([waits, fails]) == 1 and waits.poll() is None
    finally:
        waits.kill()
        waits.wait()


def test_run_starts_its_processes_stops_them_and_resumes(work: Path, alone: Path, tmp_path: Path) -> None:
    """One line, one exit code, one command to resume; and the weights are those of one process."""
    out, log = tmp_path / "run", tmp_path / "log"
    line = ["run", str(work / "recipe.yaml"), "--out", str(out), "--until", "uptrain", "--set", "train.processes=2"]
    line += ["--set", f"train.tokens={30 * 5 * 32}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cla_convert", *line], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    wait_for_rows(process, out / "metrics.jsonl")
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=250)
    assert process.returncode == 130, stderr
    assert stderr.count("Everything is saved in") == 1 and "Traceback" not in stderr, stderr
    assert stderr.count("cla-convert run") >= 1 and "torchrun" not in stderr and "cla-convert uptrain" not in stderr
    steps = len([row for row in read_rows(out / "metrics.jsonl") if "loss" in row])
    assert [int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir()] == [steps]
    assert finish(start(line, log)) == [0], log.read_text()
    assert log.read_text().count("resuming from") == 1 and "not bit-exact" not in log.read_text()
    assert not (out / "checkpoints").exists()
    trained = json.loads((out / "train.json").read_text())
    assert trained["steps"] == 30 and trained["processes"] == 2
    # The same text, in the same order, as one process of `run` sees.
    single = tmp_path / "single"
    assert finish(start([*line[:3], str(single), *line[4:], "--set", "train.processes=1"], log)) == [0], log.read_text()
    assert_equal(load_file(single / "uptrained" / "model.safetensors"), load_file(out / "uptrained/model.safetensors"))


def test_a_process_of_a_run_that_fails_ends_it(work: Path, tmp_path: Path) -> None:
    line = ["run", work / "recipe.yaml", "--out", tmp_path / "run", "--until", "uptrain", "--set", "train.processes=2"]
    line += ["--set", "train.tokens=3200", "--set", "train.learning_rate=1e30", "--set", "train.clip=1e30"]
    assert finish(start(line, log := tmp_path / "log")) == [3], log.read_text()
    assert "not finite" in log.read_text() and "Traceback" not in log.read_text()
