"""Under what the stages of a run were made, where that was not the same for all: told stage by stage."""

import re
from collections.abc import Callable, Mapping, Sequence

from .content import Column, Row, Table
from .formats import duration, hardware_line
from .run_folder import Json, RunFiles
from .text import Text


def invocations_of(run: RunFiles) -> list[Json]:
    """As environment.json has them, in order of time."""
    return list(run.environment.get("invocations") or [])


def stages_of(one: Json) -> str:
    """`convert 12 s, uptrain 3 min 45 s`."""
    return ", ".join(f"{name} {duration(spent)}" for name, spent in one["stages"].items())


def hardware_of(invocations: Sequence[Json]) -> list[str]:
    """A line a machine; with its stages, where there are several."""
    machines: dict[str, list[str]] = {}
    for one in invocations:
        if one.get("hardware"):
            machines.setdefault(hardware_line(one["hardware"]), []).extend(one["stages"])
    if len(machines) < 2:
        return list(machines)
    return [f"{', '.join(dict.fromkeys(stages))}: {machine}" for machine, stages in machines.items()]


def versions_of(invocations: Sequence[Json]) -> dict[str, list[str]]:
    """Every version that a package had, in order."""
    found: dict[str, dict[str, None]] = {}
    for one in invocations:
        for name, version in (one.get("versions") or {}).items():
            found.setdefault(name, {})[str(version)] = None
    return {name: list(versions) for name, versions in found.items()}


def mixed(invocations: Sequence[Json]) -> list[str]:
    """What was not the same for all stages: packages, and the machine."""
    packages = [name for name, versions in versions_of(invocations).items() if len(versions) > 1]
    machines = {(hardware_line(one.get("hardware") or {}), one.get("device")) for one in invocations}
    return [*packages, *(["machine or device"] if len(machines) > 1 else [])]


def table(invocations: Sequence[Json]) -> Table:
    """What each made, when, and under what that others were not made under."""
    several = {name for name, versions in versions_of(invocations).items() if len(versions) > 1}
    shown: dict[str, Callable[[Json], Text]] = {"Made": stages_of, "Begun": lambda one: _minute(one.get("began"))}
    if len({one.get("command") for one in invocations}) > 1:
        shown["By"] = lambda one: str(one.get("command") or "not recorded")  # as text it is broken into lines
    if several:
        shown["With"] = lambda one: _versions(one.get("versions") or {}, several)
    if "machine or device" in mixed(invocations):
        shown["On"] = lambda one: f"{one.get('device')}: {hardware_line(one.get('hardware') or {})}"
    columns = [Column(title, text=True, long=title not in ("Made", "Begun")) for title in shown]
    return Table(columns, [Row([cell(one) for cell in shown.values()]) for one in invocations])


def _minute(moment: object) -> str:
    """`2026-11-26T09:13:41+00:00` -> `2026-11-26 09:13 UTC`; what is none of ours stays."""
    return re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\d\+00:00$", r"\1 \2 UTC", str(moment or ""))


def _versions(versions: Mapping[str, str], names: set[str]) -> str:
    return ", ".join(f"{name} {versions.get(name, 'not there')}" for name in sorted(names))
