"""Stopping and resuming real processes: killed at any moment, asked to stop, out of disk, under changed settings."""

import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cla_convert.files import read_rows
from tests.launch import finish, go_on, prepare, start, uptrain

STEPS = 16
EVERY_STEP: dict[str, Any] = {"checkpoint_every": 1, "keep_checkpoints": 1, "validate_every": 640}
_MEASURED = ("seconds", "tokens_per_second", "peak_memory_bytes", "mfu")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return prepare(tmp_path_factory.mktemp("stopping"), tiny_llama)


@pytest.fixture(scope="module")
def uninterrupted(work: Path) -> Path:
    run(uptrain(work, work / "whole", steps=STEPS, **EVERY_STEP), work / "whole.log")
    return work / "whole"


def run(line: list[object], log: Path, code: int = 0, **options: Any) -> str:
    """Run it to the end; what it printed."""
    before = log.read_text() if log.exists() else ""
    assert finish(start(line, log, **options)) == [code], log.read_text().removeprefix(before)
    return log.read_text().removeprefix(before)


def state(out: Path) -> Path:
    return out.with_name(f"{out.name}.state")


def there(folder: Path, pattern: str) -> bool:
    """Whether the folder has such an entry, while the process may be removing it."""
    try:
        return any(folder.glob(pattern))
    except FileNotFoundError:
        return False


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (state(out) / "checkpoints").glob("step-*"))


def rows(out: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if name not in _MEASURED}
        for row in read_rows(state(out) / "metrics.jsonl")
    ]


def same_weights(one: Path, other: Path) -> bool:
    mine, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def wait_until(process: BaseProcess, reached: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while process.is_alive() and not reached() and time.monotonic() < deadline:
        time.sleep(0.0005)


def stop(process: BaseProcess, number: signal.Signals, log: Path) -> int | None:
    """Send it a signal, and only then let it go on if it was to pause; its exit code."""
    if process.is_alive():
        os.kill(process.pid or 0, number)
    go_on(log)
    return finish(process)[0]


class Attempts:
    """Runs that are killed again and again, each until one of them comes through."""

    def __init__(self, work: Path, folder: Path, whole: Path) -> None:
        self.work, self.folder, self.whole = work, folder, whole
        self.finished = self.newest = 0
        self.seen: Counter[str] = Counter()

    @property
    def out(self) -> Path:
        return self.folder / f"run{self.finished}"

    def attempt(self, reached: Callable[[], bool], delay: float, slow_disk: float = 0.0) -> bool:
        """Start or resume, wait for the moment and a little longer, kill; whether that came in time."""
        line, log = uptrain(self.work, self.out, steps=STEPS, **EVERY_STEP), self.folder / "log"
        process = start(line, log, slow_disk=slow_disk)
        wait_until(process, reached)
        time.sleep(delay)
        code = stop(process, signal.SIGKILL, log)
        assert code in (0, -signal.SIGKILL), log.read_text()[-2000:]
        self.check()
        if (state(self.out) / "train.json").exists():
            assert self.out.exists() and rows(self.out) == rows(self.whole)
            self.finished, self.newest = self.finished + 1, 0
        return code != 0

    def check(self) -> None:
        """What has its final name is whole, and what was reached is not lost."""
        assert not self.out.exists() or same_weights(self.out, self.whole)
        if (state(self.out) / "train.json").exists():
            return
        for step in checkpoints(self.out):
            path = state(self.out) / "checkpoints" / f"step-{step:08d}"
            sizes = json.loads((path / "state.json").read_text())["files"]
            assert sizes == {file.name: file.stat().st_size for file in path.iterdir() if file.name != "state.json"}
            assert len(sizes) == 4 and all(load_file(path / name) for name in sizes)
        newest = max(checkpoints(self.out), default=0)
        assert newest >= self.newest
        self.newest = newest
        self.seen["checkpoint"] += there(state(self.out) / "checkpoints", ".tmp-*")
        self.seen["publishing"] += self.out.exists() or there(self.folder, f".{self.out.name}.partial-*")


RARE = {"checkpoint": "checkpoint", "publish": "publishing"}  # the moment to wait for, what the kill then finds


SLOW_DISK = 0.03
"""Seconds a sync, where those moments are waited for: they would last a millisecond otherwise."""


def rare(seen: Counter[str]) -> Iterator[str]:
    """The same again until each was hit three times: a busy machine may miss some."""
    for _ in range(40):
        yield from (moment for moment, found in RARE.items() if seen[found] < 3)


@pytest.mark.timeout(1800)  # some thirty processes, one after another
def test_killed_at_twenty_moments(work: Path, tmp_path: Path, uninterrupted: Path) -> None:
    """kill -9 at random moments, while a checkpoint is written and while the result is published."""
    attempts, rng = Attempts(work, tmp_path, uninterrupted), random.Random(0)
    moments: dict[str, Callable[[], bool]] = {
        "any": lambda: state(attempts.out).exists(),
        "step": lambda: len(rows(attempts.out)) > attempts.newest + 2,
        "checkpoint": lambda: there(state(attempts.out) / "checkpoints", ".tmp-*"),
        "publish": lambda: there(tmp_path, ".run*.partial-*"),
    }
    delays = {"any": 1.0, "step": 0.02, "checkpoint": 0.02, "publish": 0.01}
    for name in itertools.chain(list(moments) * 5, rare(attempts.seen)):
        slow_disk = SLOW_DISK if name in RARE else 0.0
        while not attempts.attempt(moments[name], rng.uniform(0, delays[name]), slow_disk):
            pass  # it was done before: again
    assert all(attempts.seen[found] >= 3 for found in RARE.values()), attempts.seen
    while attempts.newest or not attempts.finished:  # the last one may come through
        attempts.attempt(lambda: False, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop_it_saves_and_resumes_bit_for_bit(
    work: Path, tmp_path: Path, uninterrupted: Path, number: signal.Signals
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    line = uptrain(work, out, steps=STEPS, **EVERY_STEP | {"checkpoint_every": 0})
    process = start(line, log, pause_at=5)
    wait_until(process, lambda: len(rows(out)) > 5)
    assert stop(process, number, log) == 130, log.read_text()
    assert f"fix: Resume with: cla-convert uptrain {work / 'converted'} {out}" in log.read_text()
    assert len(checkpoints(out)) == 1 and not out.exists()
    assert "resuming from" in run(line, log)
    assert same_weights(out, uninterrupted) and rows(out) == rows(uninterrupted)


def test_asked_to_stop_it_saves_though_nobody_reads_what_it_says(work: Path, tmp_path: Path) -> None:
    """Ctrl-C ends what the output is piped to (`2>&1 | tee log`) as well, and before."""
    out, log = tmp_path / "out", tmp_path / "log"
    line = uptrain(work, out, steps=STEPS, checkpoint_every=0)
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    process = start(line, log, pause_at=5)
    wait_until(process, lambda: len(rows(out)) > 4)
    os.close(reader)
    assert stop(process, signal.SIGINT, log) == 130
    assert len(checkpoints(out)) == 1
    assert "resuming from" in run(line, tmp_path / "second.log")


def test_two_runs_do_not_share_a_folder(work: Path, tmp_path: Path, uninterrupted: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    line = uptrain(work, out, steps=STEPS, **EVERY_STEP)
    process = start(line, log, pause_at=2)
    wait_until(process, lambda: len(rows(out)) > 1)
    printed = run([*line, "--set", "train.learning_rate=1e-5"], tmp_path / "second.log", code=3)
    go_on(log)
    assert f"Another process is at work in {state(out)}" in printed
    assert finish(process) == [0], log.read_text()
    assert same_weights(out, uninterrupted) and rows(out) == rows(uninterrupted)


def test_a_run_that_cannot_start_leaves_nothing(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = uptrain(work, out, steps=1, options=["--teacher", tmp_path / "nowhere"])
    run(line, tmp_path / "log", code=3)
    line[1] = tmp_path / "no-model"
    assert "tokenizer" not in run(line[:4] + line[4:-2], tmp_path / "log2", code=3)
    assert not out.exists() and not state(out).exists()


def test_cross_entropy_asks_for_no_teacher(work: Path, tmp_path: Path) -> None:
    line = uptrain(work, tmp_path / "out", steps=1, loss="cross_entropy", options=["--set", "source.model=''"])
    run(line, tmp_path / "log")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.fixture
def stopped(work: Path, tmp_path: Path) -> Path:
    """A run that was stopped early."""
    out = tmp_path / "out"
    log = tmp_path / "log"
    process = start(uptrain(work, out, steps=STEPS, **EVERY_STEP), log, pause_at=3)
    wait_until(process, lambda: len(rows(out)) > 3)
    assert stop(process, signal.SIGTERM, log) == 130, log.read_text()
    return out


def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_so(work: Path, stopped: Path, uninterrupted: Path) -> None:
    line, log = uptrain(work, stopped, steps=STEPS, **EVERY_STEP), stopped.with_name("log")
    before = checkpoints(stopped)
    printed = run(line, log, code=3, file_limit=100_000)  # a weight file has 250 kB
    last = state(stopped) / "checkpoints" / f"step-{before[-1]:08d}"
    assert "File too large" in printed and f"The last good checkpoint is kept: {last}" in printed
    assert "run the same command again" in printed and "Traceback" not in printed
    assert checkpoints(stopped) == before and not list(last.parent.glob(".tmp-*"))
    run(line, log)
    assert same_weights(stopped, uninterrupted)


def test_a_damaged_checkpoint_is_named_and_not_used(work: Path, stopped: Path, uninterrupted: Path) -> None:
    (newest,) = (state(stopped) / "checkpoints").glob("step-*")
    file = next(newest.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size // 2)
    printed = run(uptrain(work, stopped, steps=STEPS, **EVERY_STEP), stopped.with_name("log2"))
    assert f"{newest} is damaged" in printed and "resuming" not in printed
    assert same_weights(stopped, uninterrupted)


def test_changed_settings_are_refused_unless_named_and_then_recorded(work: Path, stopped: Path) -> None:
    log, step = stopped.with_name("log"), checkpoints(stopped)[-1]
    changed = uptrain(work, stopped, steps=STEPS, **EVERY_STEP, learning_rate=1e-3, clip=0.5)
    printed = run(changed, log, code=3)
    assert "train.clip: 1.0 -> 0.5; train.learning_rate: 0.003 -> 0.001" in printed
    assert "--allow-change train.clip --allow-change train.learning_rate" in printed
    printed = run([*changed, "--allow-change", "train.clip"], log, code=3)
    assert "train.learning_rate" in printed and "train.clip:" not in printed
    lengths = uptrain(work, stopped, steps=STEPS, **EVERY_STEP, batch_tokens=64)
    assert "train.batch_tokens" in run([*lengths, "--allow-change", "train"], log, code=3)  # another place in the data
    printed = run([*changed, "--allow-change", "train"], log)
    assert "warning: resuming with train.clip: 1.0 -> 0.5" in printed
    clip = {"name": "train.clip", "before": 1.0, "after": 0.5}
    rate = {"name": "train.learning_rate", "before": 0.003, "after": 0.001}
    expected = {"step": step, "changed": [clip, rate]}
    assert json.loads((state(stopped) / "train.json").read_text())["changes"] == [expected]
    assert json.loads((stopped / "cla_manifest.json").read_text())["uptraining"]["changes"] == [expected]
    assert "\nllama, converted to" in (stopped / "README.md").read_text()
    assert f"Resumed after step {step} under other settings: train.clip: 1.0" in (stopped / "README.md").read_text()
    assert all(row["lr"] <= 1e-3 for row in rows(stopped) if "lr" in row and row["step"] > step)


def test_checkpoints_go_once_the_result_stands_unless_kept(work: Path, tmp_path: Path, uninterrupted: Path) -> None:
    assert uninterrupted.exists() and not (state(uninterrupted) / "checkpoints").exists()
    out, log = tmp_path / "out", tmp_path / "log"
    line = uptrain(work, out, steps=2, keep_checkpoints_after_success=True)
    run(line, log)
    assert checkpoints(out) == [2]
    refused = run(line, log, code=3)
    assert f"{out} exists" in refused
    # What is to be removed is named, and never the folder that it lies in: a run's holds the converted model too.
    made = [out, state(out) / "train.json", state(out) / "checkpoints"]
    assert f"remove {' and '.join(map(str, made))} to train again" in " ".join(refused.split())
    # Killed between publishing and recording: the same line ends it, without training again.
    (state(out) / "train.json").unlink()
    assert "resuming from" in run(line, log) and len(rows(out)) == 4
    assert (state(out) / "train.json").exists()


def test_run_resumes_under_changed_training_settings_only_before_it_is_trained(work: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    line: list[object] = ["run", work / "recipe.yaml", "--out", out, "--set", "train.tokens=320", "--until"]
    run([*line, "convert"], log)
    changed = [*line, "uptrain", "--set", "train.clip=0.5", "--set", "convert.init=first"]
    printed = run([*changed, "--allow-change", "train", "--allow-change", "convert"], log, code=2)
    assert "convert.init: 'mean' -> 'first'" in printed and "train.clip" not in printed
    changed = [*line, "uptrain", "--set", "train.clip=0.5"]
    assert "Accept it with --allow-change train.clip" in run(changed, log, code=2)
    run([*changed, "--allow-change", "train.clip"], log)
    again = [*line, "uptrain", "--set", "train.clip=0.7", "--allow-change", "train.clip"]
    assert "train.clip: 0.5 -> 0.7" in run(again, log, code=2)  # there is nothing left to train with it


def test_other_versions_on_resume_are_said_and_recorded(work: Path, stopped: Path, uninterrupted: Path) -> None:
    """Also where the first process was killed, and could record nothing of itself."""
    log, step = stopped.with_name("log"), checkpoints(stopped)[-1]
    (newest,) = (state(stopped) / "checkpoints").glob(f"step-*{step}")
    saved = json.loads((newest / "state.json").read_text())
    here = dict(saved["environment"])
    del saved["environment"]["cla-convert"]  # of a version before this was saved: nothing to tell
    saved["environment"] |= {"torch": "2.0.1", "transformers": "4.0"}
    (newest / "state.json").write_text(json.dumps(saved))
    printed = run(uptrain(work, stopped, steps=STEPS, **EVERY_STEP), log)
    now = [
        {"name": name, "before": old, "after": here[name]}
        for name, old in (("torch", "2.0.1"), ("transformers", "4.0"))
    ]
    assert f"warning: resuming with torch: '2.0.1' -> {here['torch']!r}; transformers: '4.0' ->" in printed
    assert json.loads((state(stopped) / "train.json").read_text())["resumed"] == [{"step": step, "changed": now}]
    assert same_weights(stopped, uninterrupted)
