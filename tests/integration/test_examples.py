"""The shell scripts of examples/: run with every other program replaced by one that writes down how it was called."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from cla_convert.cli import app
from cla_convert.recipe_file import load_recipe

SCRIPTS = Path(__file__).parents[2] / "examples" / "several-machines"
RECORDS = """#!/bin/bash
call=$(basename "$0")$(printf ' %q' "$@")
printf '%s\n' "$call" >>"$RECORD"
"""  # one write a call: machines are called at once, and lines of several writes would mix


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """A file that the stand-ins write to; `scontrol` answers, too."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "ssh", "torchrun", "scontrol"):
        (folder / name).write_text(RECORDS + ("printf 'one\\ntwo\\n'\n" if name == "scontrol" else ""))
        (folder / name).chmod(0o755)
    return tmp_path / "calls"


def run(calls: Path, *line: str, **environment: str) -> list[list[str]]:
    """Run a script; how it called what."""
    path = f"{calls.parent / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RECORD": str(calls), **environment}
    done = subprocess.run(["bash", *line], cwd=calls.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [shlex.split(call) for call in calls.read_text().splitlines()]


def ours(words: list[str]) -> list[str]:
    """Our own arguments in a call; parsed as they would be, with a recipe's settings, and not run."""
    start = words.index("cla_convert" if "cla_convert" in words else "cla-convert") + 1
    arguments = words[start:]
    command: Any = typer.main.get_command(app)
    verb = command.commands[arguments[0]]
    context = verb.make_context(arguments[0], arguments[1:])
    load_recipe(None, context.params.get("sets") or [])
    return arguments


def test_slurm_converts_on_one_machine_trains_on_all_and_reports(calls: Path) -> None:
    slurm = {"SLURM_JOB_NODELIST": "[one-two]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "OUT": "runs/my run"}
    script = str(SCRIPTS / "slurm.sh")
    convert, scontrol, train, report = run(calls, script, **slurm)
    assert scontrol == ["scontrol", "show", "hostnames", "[one-two]"]
    assert ours(convert) == ["run", "recipe.yaml", "--out", "runs/my run", "--until", "convert"]
    assert train[:6] == ["srun", "torchrun", "--nnodes", "2", "--nproc-per-node", "8"] and "one:29500" in train
    assert ours(train)[:3] == ["uptrain", "runs/my run/converted", "runs/my run/uptrained"]
    assert ours(report) == ["run", "recipe.yaml", "--out", "runs/my run"]
    (calls.parent / "runs" / "my run").mkdir(parents=True)
    (calls.parent / "runs" / "my run" / "train.json").touch()
    calls.unlink()
    assert [ours(call)[0] for call in run(calls, script, **slurm)] == ["run", "run"]  # trained already


def test_ssh_starts_the_same_on_every_machine(calls: Path) -> None:
    started = run(calls, str(SCRIPTS / "ssh.sh"), "my model", "out", "recipe.yaml", "one", "two")
    assert sorted(call[1] for call in started) == ["one", "two"]
    lines = {call[2] for call in started}
    assert len(lines) == 1
    calls.unlink()
    subprocess.run(["bash", "-c", lines.pop()], env=os.environ | {"RECORD": str(calls)}, check=True)
    words = shlex.split(calls.read_text())
    assert words[:5] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "gpu"] and "one:29500" in words
    assert ours(words)[:5] == ["uptrain", "my model", "out", "--recipe", "recipe.yaml"]


def test_ssh_says_how_it_is_used() -> None:
    done = subprocess.run(["bash", str(SCRIPTS / "ssh.sh"), "model"], capture_output=True, text=True)
    assert done.returncode == 2 and "ssh.sh MODEL OUT RECIPE MACHINE MACHINE" in done.stderr
