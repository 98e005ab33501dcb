"""What the run took."""

from collections.abc import Sequence

from ..content import Block, Facts
from ..formats import duration, hardware_line, integer
from ..invocations import hardware_of
from ..run_folder import Json
from ..section import Material, Section, register
from ..text import Text


def collect(material: Material, report: Json) -> Json:
    """stage_seconds as the pipeline recorded them, hardware."""
    environment = material.run.environment
    found = environment.get("stages") or environment.get("seconds")
    return {"stage_seconds": dict(found) if isinstance(found, dict) else {}, "hardware": environment.get("hardware")}


def show(report: Json) -> Sequence[Block]:
    """Time, tokens, hardware."""
    facts: list[tuple[str, Text]] = []
    if report["stage_seconds"]:
        facts.append(
            ("Time", ", ".join(f"{stage} {duration(spent)}" for stage, spent in report["stage_seconds"].items()))
        )
    if train := report["train"]:
        control = report["control"] and report["control"]["train"]
        facts.append(
            ("Training tokens", integer(train["tokens"]) + (", and as many for the control" if control else ""))
        )
    one = [hardware_line(report["hardware"])] if report["hardware"] else []
    if machines := hardware_of(report["invocations"]) or one:
        facts.append(("Hardware", "; ".join(machines)))
    return [Facts([*facts, ("Energy", "not measured")])]


register(Section("cost", place=90, title="What it took", collect=collect, show=show))
