"""Real runs of the command line, as processes that start in a fraction of a second.

A server process imports torch and transformers once; every run is forked from it. The runs are as real as any: own
process, own memory, signals, limits and exit codes; only the imports are shared. What an import reads or does is seen
in `cla_anew` alone.
"""

import gc
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import count, zip_longest
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "__main__",
        "tests.launch",
        "cla_convert.cli",
        "cla_convert.pipeline",
        "cla_convert.report.report",
        "cla_convert.training.loop",
        "scipy.stats",
        "transformers.models.llama.modeling_llama",
    ]
)
LENGTH, BATCH = 32, 5
_BLOCK, _PORTS = 40, count()
"""Ports of a process of tests, below those that the kernel gives to whoever asks for any (32768 on Linux)."""


def prepare(folder: Path, source: Path) -> Path:
    """A folder with what uptraining needs: converted/ (of `source`) and text.jsonl."""
    from cla_convert.conversion.convert import convert
    from cla_convert.conversion.plan import make_plan
    from cla_convert.models.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(source)
    convert(make_plan(checkpoint, sharing="cla2", init="mean"), checkpoint, folder / "converted")
    words = ["the", "cat", "sat", "on", "mats", "while", "dogs", "ran", "over", "green", "hills", "to", "see", "ships"]
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(words, k=60))} for _ in range(60)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "recipe.yaml").write_text(
        json.dumps(
            {
                "source": {"model": str(source)},
                "convert": {"sharing": "cla2", "init": "mean", "calibration": {"tokens": 1000}},
                "data": {"sources": [{"path": str(folder / "text.jsonl")}], "held_out": 0.1},
                "train": dict(sequence_length=LENGTH, batch_tokens=BATCH * LENGTH, micro_batch_size=2,
                              precision="float32", learning_rate=3e-3, validation_tokens=4 * LENGTH),
                "eval": {"tasks": ["openbookqa"], "limit": 1},
                "device": "cpu",
            }
        )
    )  # fmt: skip
    return folder


def uptrain(work: Path, out: Path, *, steps: float, options: Sequence[object] = (), **train: Any) -> list[object]:
    """The command line that uptrains for so many steps of BATCH sequences (the last one may be a part)."""
    settings = {"tokens": round(steps * BATCH) * LENGTH, **train}
    sets = [word for name, value in settings.items() for word in ("--set", f"train.{name}={json.dumps(value)}")]
    return ["uptrain", work / "converted", out, "--recipe", work / "recipe.yaml", *sets, *options]


def cla(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, to its end."""
    line, environment = ["cla-convert", *map(str, arguments)], dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = CONTEXT.Process(target=_run_in, args=(line, out, err, cwd or Path.cwd(), environment))
        _start(process)
        process.join()
        said = [file.read_text() if file.exists() else "" for file in (out, err)]
    assert process.exitcode is not None
    return subprocess.CompletedProcess(line, process.exitcode, *said)


def cla_anew(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The same in a process that imports everything itself, for seconds: with an environment that imports read."""
    command = [sys.executable, "-m", "cla_convert.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)


def start(
    arguments: Sequence[object],
    log: Path,
    *,
    file_limit: int = 0,
    pause_at: int = 0,
    slow_disk: float = 0.0,
    **environment: str,
) -> BaseProcess:
    """Start `cla-convert ARGUMENTS` with its output in `log`.

    Args:
        arguments: the command line.
        log: is appended to.
        file_limit: bytes that a file has at most which it writes.
        pause_at: it waits after the row of this step until `go_on`: however busy the machine, it is no further.
        slow_disk: seconds that syncing a file takes at least, so that the moments in which something is half-written
            last long enough to be met.
        environment: besides what it inherits.
    """
    inherited = {name: os.environ[name] for name in ("CLA_CONVERT_CACHE", "HF_HUB_OFFLINE")}
    line = ["cla-convert", *map(str, arguments)]
    _gate(log).unlink(missing_ok=True)
    process = CONTEXT.Process(target=_run, args=(line, log, file_limit, pause_at, slow_disk, inherited | environment))
    _start(process)
    return process


def _start(process: BaseProcess) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # the server reads them when it is started
            patch.setenv(name, "1")
        process.start()


def go_on(log: Path) -> None:
    """Let those go on that were started to pause, and write to this log."""
    _gate(log).touch()


def start_team(
    arguments: Sequence[object],
    log: Path,
    size: int = 2,
    file_limits: Sequence[int] = (0, 0, 0),
    machines: Sequence[dict[str, str]] = ({},),
    pause_at: int = 0,
) -> list[BaseProcess]:
    """Start it `size` times with the environment that torchrun gives; `log` holds the output of all.

    Of several `machines`, each has so many processes and what it says in its environment.
    """
    common = {"WORLD_SIZE": size * len(machines), "LOCAL_WORLD_SIZE": size, "GROUP_WORLD_SIZE": len(machines)}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    environments = [
        {**common, "GROUP_RANK": group, "LOCAL_RANK": rank, "RANK": group * size + rank, **machine}
        for group, machine in enumerate(machines)
        for rank in range(size)
    ]
    return [
        start(
            arguments, log, file_limit=limit, pause_at=pause_at,
            **{name: str(value) for name, value in environment.items()},
        )
        for environment, limit in zip_longest(environments, file_limits[: len(environments)], fillvalue=0)
    ]  # fmt: skip


def free_port() -> int:
    """A port that nobody listens on, and that nobody gets before it is used who asks the kernel for any."""
    while True:
        port = 20_000 + (os.getpid() * _BLOCK + next(_PORTS) % _BLOCK) % 12_000
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("localhost", port))
            except OSError:
                continue
        return port


def finish(*processes: BaseProcess, seconds: float = 300) -> list[int | None]:
    """Wait for them; their exit codes (None: not ended)."""
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]


def _gate(log: Path) -> Path:
    return log.with_name(f"{log.name}.go")


def _run(
    line: list[str], log: Path, file_limit: int, pause_at: int, slow_disk: float, environment: dict[str, str]
) -> None:
    import resource

    os.environ.update(environment)
    _lead(log, log)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if pause_at:
        _pause_at(pause_at, _gate(log))
    if slow_disk:
        _slow_down(slow_disk)
    _main(line)


def _run_in(line: list[str], out: Path, err: Path, cwd: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    _lead(out, err)
    _main(line)


def _lead(*files: Path) -> None:
    """Let what is printed go to these files, stdout and stderr, and a closed terminal be heard, even under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)


def _main(line: list[str]) -> None:
    import torch

    from cla_convert.cli import main

    gc.freeze()  # what was imported is no garbage: nobody looks through it again
    torch.set_num_threads(1)
    sys.argv = line
    main()


def _pause_at(step: int, gate: Path) -> None:
    from cla_convert.training.metrics import Metrics

    write = Metrics.write

    def written(self: Metrics, row: dict[str, Any]) -> None:
        write(self, row)
        end = time.monotonic() + 300  # a test that failed lets nobody go on
        while row["step"] == step and "loss" in row and not gate.exists() and time.monotonic() < end:
            time.sleep(0.01)

    Metrics.write = written


def _slow_down(seconds: float) -> None:
    sync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(seconds)
        sync(descriptor)

    os.fsync = slow
