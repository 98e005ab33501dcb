"""Uptraining on several machines: the numbers of one process, caches and folders shared or not, what may get lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from cla_convert.files import read_rows
from tests.conftest import save_tiny_llama
from tests.integration.test_parallel import EVERY_STEP, STEPS, assert_equal, rows, saved, wait_for_step
from tests.launch import finish, free_port, go_on, prepare, start, start_team, uptrain

TWO: Sequence[dict[str, str]] = ({}, {})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model whose head is not tied, and text."""
    folder = tmp_path_factory.mktemp("machines")
    return prepare(folder, save_tiny_llama(folder / "source", tie_word_embeddings=False))


@pytest.fixture(scope="module")
def alone(work: Path) -> Path:
    """The run of one process, with all its checkpoints."""
    line = uptrain(work, work / "alone", steps=STEPS, **EVERY_STEP)
    assert finish(start(line, work / "alone.log")) == [0], (work / "alone.log").read_text()
    return work / "alone"


def assert_same_training(alone: Path, out: Path) -> None:
    """Gradients (the first moment after a step is a tenth of them), losses, norms, validation, weights."""
    for kind, step in (("exp_avg", 1), ("exp_avg", 5), ("model", 5)):
        assert_equal(saved(alone, step, kind), saved(out, step, kind))
    for mine, theirs in zip(rows(alone), rows(out), strict=True):
        for name in mine.keys() & {"step", "tokens", "loss", "lr", "grad_norm", "validation_perplexity"}:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5), (mine["step"], name)
    assert_equal(load_file(alone / "model.safetensors"), load_file(out / "model.safetensors"))


def files_of(out: Path, step: int) -> list[str]:
    folder = out.with_name(f"{out.name}.state") / "checkpoints" / f"step-{step:08d}"
    return sorted(file.name for file in folder.glob("model-*"))


@pytest.mark.parametrize(
    ("each", "degree", "parts", "gather"),
    [
        (2, "node", 2, "layer"),
        (2, "node", 2, "step"),
        (2, 1, 1, "step"),
        (1, "node", 1, "layer"),
        (2, "all", 4, "layer"),
    ],
)
def test_machines_that_hold_the_same_have_the_numbers_of_one_process(
    work: Path, alone: Path, tmp_path: Path, each: int, degree: str | int, parts: int, gather: str
) -> None:
    """Divided among the processes of a machine, and the machines add up: steps of one pass and of several."""
    out, log = tmp_path / "out", tmp_path / "log"
    options = {"shard_degree": degree, "gather": gather, "micro_batch_size": 1}
    line = uptrain(work, out, steps=STEPS, **EVERY_STEP | options)
    assert finish(*start_team(line, log, each, machines=TWO)) == [0] * 2 * each, log.read_text()
    assert files_of(out, 5) == [f"model-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]
    assert_same_training(alone, out)


@pytest.mark.parametrize(("before", "after"), [("node", "all"), ("all", "node")])
def test_a_checkpoint_fits_another_division(work: Path, alone: Path, tmp_path: Path, before: str, after: str) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    line = uptrain(work, out, steps=STEPS, shard_degree=before, **EVERY_STEP)
    processes = start_team(line, log, 2, machines=TWO, pause_at=2)
    wait_for_step(processes, out, 2)
    os.kill(processes[3].pid or 0, signal.SIGTERM)  # to one process of one machine
    go_on(log)
    assert finish(*processes) == [130] * 4, log.read_text()
    assert "(on every machine)" in log.read_text()
    line = uptrain(work, out, steps=STEPS, shard_degree=after, **EVERY_STEP)
    assert finish(*start_team(line, log, 2, machines=TWO)) == [0] * 4, log.read_text()
    assert log.read_text().count("resuming from") == 1 and log.read_text().count("not bit-exact") == 1
    assert_equal(saved(alone, 5, "model"), saved(out, 5, "model"))


def test_what_cannot_be_divided_is_refused(work: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    line = uptrain(work, tmp_path / "out", steps=2, shard_degree=3)
    assert finish(*start_team(line, log, 2, machines=TWO)) == [2] * 4
    assert log.read_text().count("4 processes cannot be divided into groups of 3") == 1


def test_machines_share_a_cache_or_have_their_own(work: Path, alone: Path, tmp_path: Path) -> None:
    shared, mine, theirs = tmp_path / "shared", tmp_path / "mine", tmp_path / "theirs"
    for name, caches in (("one", (shared, shared)), ("two", (mine, theirs))):
        out, log = tmp_path / name, tmp_path / f"{name}.log"
        machines = [{"CLA_CONVERT_CACHE": str(cache)} for cache in caches]
        line = uptrain(work, out, steps=STEPS, **EVERY_STEP)
        assert finish(*start_team(line, log, 1, machines=machines)) == [0, 0], log.read_text()
        assert_same_training(alone, out)
    for cache in (shared, mine, theirs):
        assert [len(list(folder.glob("*.bin"))) for folder in (cache / "tokens").iterdir()] == [3]
        assert not list(cache.rglob("*.tmp"))


def test_a_folder_that_machines_do_not_share_is_refused_before_training(work: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    port, processes = str(free_port()), []
    for number, out in enumerate(("here/out", "there/out")):
        environment = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "GROUP_WORLD_SIZE": "2"}
        processes.append(start(uptrain(work, tmp_path / out, steps=2), log, file_limit=0, **environment))
    assert finish(*processes) == [3, 3], log.read_text()
    assert log.read_text().count("is not the same folder for all processes") == 1
    assert not list(tmp_path.rglob(".shared-*")) and not list(tmp_path.rglob("step-*"))


def test_other_settings_on_one_machine_are_named(work: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    port, processes = str(free_port()), []
    for number, every in enumerate((1, 64)):
        environment = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "GROUP_WORLD_SIZE": "2"}
        line = uptrain(work, tmp_path / "out", steps=2, checkpoint_every=every)
        processes.append(start(line, log, file_limit=0, **environment))
    assert finish(*processes) == [3, 3], log.read_text()
    assert "why: train.checkpoint_every: 64 instead of 1." in log.read_text()


class Agents:
    """Two agents of torchrun that meet on the loopback, one process each."""

    def __init__(self, line: Sequence[object], *options: str) -> None:
        meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
        meet += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1", *options]
        command = [sys.executable, "-m", "torch.distributed.run", *meet, "-m", "cla_convert", *map(str, line)]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
        self.agents = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
            for _ in range(2)
        ]

    def wait_until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not reached() and time.monotonic() < deadline:
            assert all(agent.poll() is None for agent in self.agents), self.end()
            time.sleep(0.01)

    def worker(self, agent: int) -> int:
        """The process that an agent started."""
        number = self.agents[agent].pid
        return int(Path(f"/proc/{number}/task/{number}/children").read_text().split()[0])

    def end(self) -> str:
        """Wait; what they printed."""
        return "".join(agent.communicate(timeout=250)[0] for agent in self.agents)


def steps_of(metrics: Path) -> int:
    return max((row["step"] for row in read_rows(metrics)), default=0)


def at_work(process: int) -> bool:
    """Whether it runs; one that has ended may wait for somebody to ask how."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_two_agents_of_torchrun(work: Path, tmp_path: Path) -> None:
    """An agent is killed: all save. The same line resumes, starts a killed process again, and stops when asked to."""
    out, state = tmp_path / "out", tmp_path / "out.state"
    metrics = state / "metrics.jsonl"
    line = uptrain(work, out, steps=400, validation_tokens=16384, validate_every=160, checkpoint_every=320)
    agents = Agents(line)
    agents.wait_until(lambda: steps_of(metrics) > 1)
    workers = [agents.worker(0), agents.worker(1)]
    agents.agents[1].kill()
    printed = agents.end()
    assert printed.count("Everything is saved in") == 1, printed
    deadline = time.monotonic() + 250
    while any(map(at_work, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(at_work, workers))  # nobody trains on without an agent
    before = steps_of(metrics)
    agents = Agents(line, "--max-restarts", "1", "--monitor-interval", "0.2")
    agents.wait_until(lambda: steps_of(metrics) > before + 3)
    begun = metrics.stat().st_ino  # a resumed run makes the file anew
    os.kill(agents.worker(1), signal.SIGKILL)
    agents.wait_until(lambda: metrics.stat().st_ino != begun)
    again = steps_of(metrics)
    agents.wait_until(lambda: steps_of(metrics) > again + 1)
    for agent in agents.agents:
        agent.send_signal(signal.SIGTERM)
    printed = agents.end()
    assert printed.count(f"resuming from {state / 'checkpoints' / f'step-{before:08d}'}") == 1, printed
    assert printed.count("resuming from") == 2 and printed.count("Everything is saved in") == 1, printed
    resume = r"Resume with: torchrun --nnodes 2 .* --max-restarts 1 .* -m cla_convert uptrain .* \(on every machine\)"
    assert re.search(resume, printed), printed
    done = steps_of(metrics)
    assert [row["step"] for row in read_rows(metrics) if "loss" in row] == list(range(1, done + 1)) and done < 400
    assert max(path.name for path in (state / "checkpoints").iterdir()) == f"step-{done:08d}"


def test_a_lost_process_is_told_with_the_last_checkpoint(work: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    processes = start_team(uptrain(work, out, steps=60, **EVERY_STEP), log, 1, machines=TWO, pause_at=3)
    wait_for_step(processes, out, 3)
    os.kill(processes[1].pid or 0, signal.SIGKILL)
    go_on(log)
    assert finish(*processes) == [3, -9], log.read_text()
    told = log.read_text()
    assert "Another process of the training is gone" in told and "Traceback" not in told
    assert "The last good checkpoint is" in told and "Run again: torchrun --nnodes 2 --nproc-per-node 1 -m" in told
    assert json.loads((out.with_name("out.state") / "checkpoints" / "step-00000002" / "state.json").read_text())
