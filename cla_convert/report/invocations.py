"""Under what the stages of a run were made, where that was not the same for all: told stage by stage."""

from collections.abc import Mapping, Sequence

from .content import Column, Row, Table
from .formats import duration, hardware_line
from .run_folder import Json, RunFiles
from .text import Text, code


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
    columns = [Column("Made", text=True), Column("Begun", text=True), Column("By", text=True, long=True)]
    columns += [Column("With", text=True, long=True)] if several else []
    columns += [Column("On", text=True, long=True)] if "machine or device" in mixed(invocations) else []
    return Table(columns, [_row(one, several, len(columns) - 3 - bool(several)) for one in invocations])


def _row(one: Json, several: set[str], with_machine: int) -> Row:
    cells: list[Text] = [stages_of(one), str(one.get("began") or ""), code(one.get("command") or "not recorded")]
    if several:
        cells.append(_versions(one.get("versions") or {}, several))
    if with_machine:
        cells.append(f"{one.get('device')}: {hardware_line(one.get('hardware') or {})}")
    return Row(cells)


def _versions(versions: Mapping[str, str], names: set[str]) -> str:
    return ", ".join(f"{name} {versions.get(name, 'not there')}" for name in sorted(names))
