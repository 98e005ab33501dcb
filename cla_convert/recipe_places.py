"""Relative paths in a recipe count from the folder that one is in: who meant that of the recipe is told so."""

import glob
from collections.abc import Mapping
from pathlib import Path

from .errors import UsageError
from .files import is_place, path_of
from .recipe import Recipe


def refuse_beside(recipe: Recipe, file: Path, origins: Mapping[str, str]) -> None:
    """Raise UsageError for a path in a recipe's file that leads to something from there, and to nothing from here.

    What may as well be an id of the hub is one, unless a model lies there.
    """
    for name, place in recipe.places:
        beside, of_hub = file.parent / place, name in (*_MODELS, "data.sources[].dataset") and not is_place(place)
        there = name in _MODELS and (beside / "config.json").is_file() if of_hub else _leads(beside)
        if origins.get(name.partition("[")[0]) == "recipe" and there and not _leads(path_of(place)):
            hub = f"; for the hub's, --set {name}={place}" if of_hub else ""
            raise UsageError(
                f"{name}: there is no {place!r} in {Path.cwd()}",
                why=f"It lies beside {file}, and relative paths count from the folder that you are in.",
                fix=f"Write {str(beside)!r}, or give an absolute path{hub}.",
            )


_MODELS = ("source.model", "train.teacher")


def _leads(path: Path) -> bool:
    """Whether there is such a file or folder, or any that a pattern matches."""
    patterns = (glob.escape(str(path)), str(path))
    return any(found for one in patterns for found in glob.iglob(one, recursive=True))  # noqa: PTH207  (absolute too)
