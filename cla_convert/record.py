"""Where and how each stage of a run was made, kept in environment.json.

A run may be finished in several invocations: resumed after an interruption, with other packages, on another machine. So
every stage is recorded with its own circumstances, and one that only found its results is not.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from .environment import command_line, hardware, launched, pick_device, rank, versions
from .recipe import Recipe
from .results import Environment, Invocation
from .run_folder import RunFolder


@contextmanager
def recorded(recipe: Recipe, folder: RunFolder, stage: str) -> Iterator[None]:
    """Record under what a stage of a run is made and the seconds it takes, added up over resumed runs.

    Raises:
        InputError: environment.json is damaged; before the work.
    """
    if not folder.begun or launched() or rank() > 0:  # no run, or another process records it
        yield
        return
    folder.environment.read()
    before, started = folder.made_by(stage), time.monotonic()
    began = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        yield
    finally:
        if folder.made_by(stage) != before:
            now = Invocation(
                began=began, command=command_line(), versions=versions(), hardware=hardware(),
                device=pick_device(recipe.device), stages={stage: time.monotonic() - started},
            )  # fmt: skip
            folder.environment.write(_with(folder.environment.read() or Environment(), now, recipe.seed))


def _with(before: Environment, now: Invocation, seed: int) -> Environment:
    """What is known, and what was made now: beside what was made under the same circumstances, if there is such."""
    known = before.invocations or _one_of_old(before)
    alike = next((number for number, one in enumerate(known) if _circumstances(one) == _circumstances(now)), None)
    if alike is None:
        known, alike = [*known, Invocation.model_validate(now.to_json() | {"stages": {}})], len(known)
    here = known[alike].model_copy(update={"stages": _sum(known[alike].stages, now.stages)})
    known = [*known[:alike], here, *known[alike + 1 :]]
    last = {name: value for name, value in now.to_json().items() if name not in ("began", "stages")}
    return Environment.model_validate(
        {**before.to_json(), "started": known[0].began, **last, "seeds": {"seed": seed}}
        | {"stages": _sum(*(one.stages for one in known)), "invocations": [one.to_json() for one in known]}
    )


def _one_of_old(before: Environment) -> list[Invocation]:
    """What versions before this one wrote: the last circumstances only, as if all had been made under them."""
    old = before.to_json()
    return [Invocation.model_validate(old | {"began": old.get("started")})] if before.stages else []


def _circumstances(one: Invocation) -> object:
    return one.command, one.versions, one.hardware, one.device


def _sum(*seconds: dict[str, float]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in seconds:
        total |= {stage: round(total.get(stage, 0) + spent, 1) for stage, spent in one.items()}
    return total
