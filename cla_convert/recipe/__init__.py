"""The recipe: every setting of a run, what it means and its default. Unknown keys are refused.

A recipe is a YAML file with the sections below; `recipe_file` reads it.
"""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field
from pydantic.fields import FieldInfo

from .convert import Calibration, Convert
from .data import Data, Generate, Source, Start, TextSource
from .evaluate import Evaluate, Retrieval, TextFile
from .section import FREE, NAMED, PLACES, OnResume, Section, parse_count, parse_size
from .train import Train

__all__ = [
    "FREE", "NAMED", "PLACES", "Calibration", "Convert", "Data", "Evaluate", "Generate", "OnResume", "Recipe",
    "Retrieval", "Section", "Source", "Start", "TextFile", "TextSource", "Train", "is_setting", "on_resume",
    "parse_count", "parse_size",
]  # fmt: skip


class Recipe(Section):
    """Everything a run needs."""

    source: Source = Source()
    convert: Convert = Convert()
    data: Annotated[Data, NAMED] = Data()
    train: Annotated[Train, NAMED] = Train()
    eval: Annotated[Evaluate, FREE] = Evaluate()
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of everything random: sample order, evaluation."""
    device: Annotated[str, FREE] = "auto"
    """cpu, cuda, cuda:1, mps; auto: the best there is. cuda: the first GPU, and all of them to convert a wide model and
    to evaluate one that the first has no room for; cuda:1 is that one alone."""

    @property
    def places(self) -> list[tuple[str, str]]:
        """What it reads that may be a path, and in which setting that stands."""
        named = [
            ("source.model", self.source.model),
            ("train.teacher", self.train.teacher),
            ("eval.task_data", self.eval.task_data),
            ("eval.include_path", self.eval.include_path),
            *(("eval.perplexity[].path", text.path) for text in self.eval.perplexity),
        ]
        for one in self.data.sources:
            named += [("data.sources[].path", one.path), ("data.sources[].dataset", one.dataset)]
            named += [("data.sources[].generate.openings", one.generate and one.generate.openings)]
        return [(name, place) for name, place in named if place]


def on_resume(name: str) -> OnResume | None:
    """What may become of a setting (`train.clip`) on resume: the mark of the innermost field with one."""
    marks = [one for field in _along(name) for one in field.metadata if isinstance(one, OnResume)]
    return marks[-1] if marks else None


def is_setting(name: str) -> bool:
    """Whether a recipe has a setting, or a section, of this name."""
    return len(list(_along(name))) == name.count(".") + 1


def _along(name: str) -> Iterator[FieldInfo]:
    """The fields on the way to a setting, as far as there are any."""
    section = Recipe
    for part in name.split("."):
        if (field := section.model_fields.get(part)) is None:
            return
        yield field
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            return
        section = field.annotation
