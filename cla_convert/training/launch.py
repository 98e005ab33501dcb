"""Several processes of `cla-convert` on this machine that train together, as torchrun would start them.

Not torchrun itself: its agent reports a failed or interrupted process by a traceback of its own and exit code 1.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..environment import command_line, stop_signals
from ..errors import ExitCode, Interrupted, TrainingError
from ..files import LOCKED

_GRACE = 60.0
"""Seconds that the others have to end once one has failed: they may wait for it in vain."""


def launch(arguments: Sequence[str], processes: int, locked: Path) -> None:
    """Run `cla-convert ARGUMENTS` in so many processes, and wait.

    Args:
        arguments: of the command line.
        processes: how many; the first one writes to stderr.
        locked: the folder that this process has locked for them.

    Raises:
        Interrupted: they were asked to stop and have saved.
        TrainingError: one has failed; it has said why.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    common |= {LOCKED: locked.resolve(), "CLA_CONVERT_COMMAND": command_line()}
    line = [sys.executable, "-m", "cla_convert", *arguments]
    started: list[subprocess.Popen[bytes]] = []
    with _passing_signals_on(started) as passed:
        for n in range(processes):
            environment = _environment(common | {"RANK": n, "LOCAL_RANK": n})
            started.append(subprocess.Popen(line, stdout=subprocess.DEVNULL, env=environment))
            if passed:  # perhaps not to this one, which was not in the list yet
                started[n].send_signal(passed[-1])
        code = _wait(started)
    if code == ExitCode.INTERRUPTED or -code in passed:  # those that still wait for the first just end
        raise Interrupted("Interrupted", fix=f"To resume: {command_line()}")
    if code:
        raise TrainingError(f"Uptraining in {processes} processes ended with code {code}", why="See above.")


def _environment(extra: Mapping[str, object]) -> dict[str, str]:
    # As torchrun does: processes that each take all cores only wait for each other.
    return {"OMP_NUM_THREADS": "1", **os.environ} | {name: str(value) for name, value in extra.items()}


@contextmanager
def _passing_signals_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Send what asks to stop to the processes too, and tell: they save, and end; and so does what waits for them."""
    passed: list[int] = []

    def pass_on(number: int, _: object) -> None:
        passed.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in stop_signals()}
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of the first that failed; 0 if none did."""
    failed, until = 0, float("inf")
    while None in [process.poll() for process in processes] and time.monotonic() < until:  # a list: all are looked at
        codes = [process.returncode for process in processes if process.returncode]
        if codes and not failed:
            failed, until = codes[0], time.monotonic() + _GRACE
        time.sleep(0.1)
    return failed or next((process.returncode for process in processes if process.returncode), 0)
