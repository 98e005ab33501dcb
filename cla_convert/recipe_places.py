"""Relative paths in a recipe count from the folder that one is in: who meant that of the recipe is told so."""

import glob
from collections.abc import Mapping
from pathlib import Path

from .errors import UsageError
from .files import path_of
from .recipe import Recipe


def refuse_beside(recipe: Recipe, file: Path, origins: Mapping[str, str]) -> None:
    """Raise UsageError for a path in a recipe's file that leads to something from there, and to nothing from here."""
    for name, place in recipe.places:
        beside = file.parent / place
        if origins.get(name) == "recipe" and not _leads(path_of(place)) and _leads(beside):
            raise UsageError(
                f"{name}: there is no {place!r} in {Path.cwd()}",
                why=f"It lies beside {file}, and relative paths count from the folder that you are in.",
                fix=f"Write {str(beside)!r}, or give an absolute path.",
            )


def _leads(path: Path) -> bool:
    """Whether there is such a file or folder, or any that a pattern matches."""
    patterns = (glob.escape(str(path)), str(path))
    return any(found for one in patterns for found in glob.iglob(one, recursive=True))  # noqa: PTH207  (absolute too)
