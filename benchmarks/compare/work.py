"""Running arms: each by the command line, in a process of its own, with a record of how it ended.

OUT/arms/NAME/        the run folder; OUT/arms/NAME.json of a quantised cache
OUT/records/NAME.json what was run, how it ended, seconds
OUT/logs/NAME.log     what it said
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from arms import Arm

from cla_convert.console import say
from cla_convert.errors import UsageError
from cla_convert.files import read_json, write_json

Ending = Literal["done", "failed", "interrupted"]
GRACE = 30.0
"""Seconds before the end at which what runs is asked to stop: it saves a checkpoint first."""
PATIENCE = 120.0
"""Seconds until it is stopped at once."""


@dataclass(frozen=True)
class Place:
    """Where everything lies."""

    out: Path

    def run(self, name: str) -> Path:
        return self.out / "arms" / name

    def cache(self, name: str) -> Path:
        return self.out / "arms" / f"{name}.json"

    def record(self, name: str) -> Path:
        return self.out / "records" / f"{name}.json"

    def log(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.log"

    def ended(self, arm: Arm) -> str | None:
        """How it ended under these very settings; None: not yet, or under others."""
        record = read_json(self.record(arm.name)) or {}
        return record.get("ended") if record.get("settings") == arm.settings else None

    def check(self, arms: Iterable[Arm]) -> None:
        """Raise UsageError for an arm that was begun under other settings: what came of it would be of neither.

        Settings of the evaluation may change: it measures anew.
        """
        for arm in arms:
            record = read_json(self.record(arm.name))
            before, now = (_without_eval(one) for one in (record["settings"] if record else arm.settings, arm.settings))
            if changed := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
                raise UsageError(
                    f"{self.run(arm.name)} was made under other settings",
                    why="; ".join(f"{name}: {before.get(name)!r} then, {now.get(name)!r} now" for name in changed),
                    fix=f"Give another --out, or remove it and {self.record(arm.name)}.",
                )

    def command(self, arm: Arm) -> list[str]:
        """What runs it."""
        if arm.cache:
            assert arm.parent, "arms.py: a cache is of an arm's models"
            script = Path(__file__).parents[1] / "quantised_cache.py"
            where = ["--backend", arm.cache, "--out", str(self.cache(arm.name))]
            return [sys.executable, str(script), str(self.run(arm.parent)), *where]
        line = [sys.executable, "-m", "cla_convert", "run", arm.recipe, "--out", str(self.run(arm.name)), *arm.options]
        return [*line, *(["--allow-change", "train", "--allow-change", "data"] if arm.parent else [])]


def _without_eval(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if not name.startswith("eval.")}


@dataclass
class Running:
    """A process at work on an arm."""

    arm: Arm
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)
    asked: float | None = None
    """When it was asked to stop."""

    def ask(self) -> None:
        """To save and stop; after a while, to stop at once."""
        if self.asked is None:
            self.asked = time.monotonic()
            self.process.send_signal(signal.SIGINT)
        elif time.monotonic() - self.asked > PATIENCE:
            self.process.kill()


def run_all(arms: Mapping[str, Arm], place: Place, *, jobs: int, minutes: float | None) -> dict[str, str]:
    """Run what is not there, in order, so many at a time, until the time is over; how each arm stands now.

    An arm waits for the one that it starts from, and is left out if that fails; nothing else stops for a failure.
    Raises UsageError where an arm was begun under other settings.
    """
    place.check(arms.values())
    end = None if minutes is None else time.monotonic() + 60 * minutes - min(GRACE, 6 * minutes)
    states = {name: "done" for name, arm in arms.items() if place.ended(arm) == "done"}
    waiting = [arm for name, arm in arms.items() if name not in states]
    say(f"{len(arms)} arms, {len(states)} of them there already")
    running: list[Running] = []
    stop = Stop()
    with stop:
        while waiting or running:
            over = stop.asked or (end is not None and time.monotonic() > end)
            for one in running:
                if over:
                    one.ask()
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                states[one.arm.name] = _finish(one, place)
            if over:
                waiting = []
            while len(running) < jobs and (arm := _next(waiting, states, running)):
                waiting.remove(arm)
                running.append(_start(arm, place))
            time.sleep(0.2 if running else 0)
            if not running and waiting and _next(waiting, states, running) is None:
                break  # what is left starts from what failed
    return {name: states.get(name) or _left_out(arm, states) for name, arm in arms.items()}


def _next(waiting: Iterable[Arm], states: Mapping[str, str], running: Sequence[Running]) -> Arm | None:
    """The first whose parent is there, if it can begin: one that runs alone waits until nothing else does."""
    first = next((arm for arm in waiting if arm.parent is None or states.get(arm.parent) == "done"), None)
    if first is None or any(one.arm.alone for one in running) or (first.alone and running):
        return None
    return first


def _left_out(arm: Arm, states: Mapping[str, str]) -> str:
    failed = arm.parent and states.get(arm.parent) == "failed"
    return f"not run: {arm.parent} failed" if failed else "not run yet"


def _start(arm: Arm, place: Place) -> Running:
    folder, command = place.run(arm.name), place.command(arm)
    if arm.parent and not arm.cache and not folder.exists():
        _copy(place.run(arm.parent), folder)
    log = place.log(arm.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"begin  {arm.name}")
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        # A session of its own: an interruption from the keyboard reaches it once, through `ask`.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    _record(arm, place, "running", 0)
    return Running(arm, process)


def _record(arm: Arm, place: Place, ended: str, seconds: float) -> None:
    """How it ended, and the seconds of all times that it ran."""
    before = read_json(place.record(arm.name)) or {}
    total = round(before.get("seconds", 0) + seconds, 1)
    written = {"ended": ended, "settings": arm.settings, "command": shlex.join(place.command(arm)), "seconds": total}
    write_json(place.record(arm.name), written)


def _finish(one: Running, place: Place) -> Ending:
    arm, code = one.arm, one.process.returncode
    ended: Ending = "done" if code == 0 else "interrupted" if one.asked is not None else "failed"
    seconds = time.monotonic() - one.began
    _record(arm, place, ended, seconds)
    say(f"{ended:6} {arm.name}, {seconds:.0f} s" + (f": see {place.log(arm.name)}" if ended == "failed" else ""))
    return ended


def _copy(run: Path, to: Path) -> None:
    """A run folder with its conversion; weights, which nothing writes to in place, are the same files."""

    def copy(source: str, target: str) -> None:
        if source.endswith(".safetensors"):
            os.link(source, target)
        else:
            shutil.copy2(source, target)

    half = to.with_name(f"{to.name}.copying")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(run, half, copy_function=copy)
    half.rename(to)


class Stop:
    """Whether somebody asked this process to stop: a second time, at once."""

    asked = False

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        say("stopping: what runs saves its checkpoint first; the same command goes on from there")
        self.asked = True
