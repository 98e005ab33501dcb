"""Real runs of the command line, as processes that start in a fraction of a second.

A server process imports torch and transformers once; every run is forked from it. The runs are as real as any: own
process, own memory, signals, limits and exit codes; only the imports are shared.
"""

import json
import multiprocessing
import os
import random
import socket
import sys
from collections.abc import Sequence
from itertools import zip_longest
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "__main__",
        "tests.launch",
        "cla_convert.pipeline",
        "cla_convert.training.loop",
        "transformers.models.llama.modeling_llama",
    ]
)
LENGTH, BATCH = 32, 5


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


def start(arguments: Sequence[object], log: Path, *, file_limit: int = 0, **environment: str) -> BaseProcess:
    """Start `cla-convert ARGUMENTS` with its output in `log`; a file it writes has at most `file_limit` bytes."""
    inherited = {name: os.environ[name] for name in ("CLA_CONVERT_CACHE", "HF_HUB_OFFLINE")}
    line = ["cla-convert", *map(str, arguments)]
    process = CONTEXT.Process(target=_run, args=(line, log, file_limit, inherited | environment))
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # the server reads them when it is started
    process.start()
    return process


def start_team(
    arguments: Sequence[object],
    log: Path,
    size: int = 2,
    file_limits: Sequence[int] = (0, 0, 0),
    machines: Sequence[dict[str, str]] = ({},),
) -> list[BaseProcess]:
    """Start it `size` times with the environment that torchrun gives; `log` holds the output of all.

    Of several `machines`, each has so many processes and what it says in its environment.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": size * len(machines), "LOCAL_WORLD_SIZE": size, "GROUP_WORLD_SIZE": len(machines)}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    environments = [
        {**common, "GROUP_RANK": group, "LOCAL_RANK": rank, "RANK": group * size + rank, **machine}
        for group, machine in enumerate(machines)
        for rank in range(size)
    ]
    return [
        start(arguments, log, file_limit=limit, **{name: str(value) for name, value in environment.items()})
        for environment, limit in zip_longest(environments, file_limits[: len(environments)], fillvalue=0)
    ]


def finish(*processes: BaseProcess, seconds: float = 300) -> list[int | None]:
    """Wait for them; their exit codes (None: not ended)."""
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]


def _run(line: list[str], log: Path, file_limit: int, environment: dict[str, str]) -> None:
    import resource

    import torch

    from cla_convert.cli import main

    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = line
    main()
