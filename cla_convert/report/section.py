"""A section of the report, and the registry of all of them.

A section is one file: it collects its numbers from a run folder into report.json, says in blocks (content.py) what to
show of them, draws its pictures if it has any, and registers itself:

    register(Section("energy", place=75, title="Energy", collect=collect, show=show))

The files in `sections/` are found by the registry; one elsewhere counts once it is imported.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING

from ..evaluation.verdict import Margins
from ..recipe import Evaluate
from ..registry import Registry
from .comparisons import comparison_of, control_comparison
from .content import Block
from .run_folder import Json, RunFiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Material:
    """What sections collect from."""

    run: RunFiles
    others: Sequence[RunFiles] = ()
    """Runs to compare it with."""

    @cached_property
    def margins(self) -> Margins:
        """What the verdict was fixed to beforehand."""
        return Margins.of(Evaluate.model_construct(**(self.run.recipe.get("eval") or {})))

    @property
    def seed(self) -> int:
        """Of the resampling."""
        return int(self.run.recipe.get("seed") or 0)

    @cached_property
    def comparison(self) -> Json:
        """Before against the last point."""
        return comparison_of(self.run, self.margins, self.seed)

    @cached_property
    def control(self) -> Json | None:
        """The control against the uptrained model; None without a measured control."""
        return control_comparison(self.run, self.margins, self.seed)


@dataclass(frozen=True)
class Picture:
    """A picture, drawn at a width in inches: on a phone it is narrower, with text as large."""

    alt: str
    draw: "Callable[[float], Figure]"


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    name: str
    """Unique; the id of the section in the page."""
    place: int
    """Sections stand in this order."""
    title: str = ""
    collect: Callable[[Material, Json], Json] = lambda material, report: {}
    """What it adds to report.json, every number that it shows; it may read what the sections it `needs` have added."""
    show: Callable[[Json], Sequence[Block]] = lambda report: []
    """What it shows, from report.json alone; nothing leaves the section out."""
    draw: Callable[[RunFiles, Json], Mapping[str, Picture]] = lambda run, report: {}
    """Its pictures by name; those that were drawn are named in `report["plots"]`."""
    style: Callable[[Json], str] = lambda report: ""
    """Class of the HTML element."""
    needs: Sequence[str] = field(default=())
    """Names of sections that collect before it."""

    @property
    def summary(self) -> str:
        """As every entry of a registry has one."""
        return self.title


SECTIONS: Registry[Section] = Registry("section", f"{__package__}.sections")
register = SECTIONS.register


def in_page_order() -> list[Section]:
    """All sections as they are shown."""
    return sorted(SECTIONS, key=lambda section: section.place)


def in_collection_order() -> list[Section]:
    """All sections, each after those it needs. Raises ValueError where one of those is missing."""
    sections = {section.name: section for section in in_page_order()}
    for section in sections.values():
        if missing := set(section.needs) - sections.keys():
            raise ValueError(f"the section {section.name!r} needs {min(missing)!r}, which there is not")
    graph = TopologicalSorter({name: section.needs for name, section in sections.items()})
    return [sections[name] for name in graph.static_order()]
