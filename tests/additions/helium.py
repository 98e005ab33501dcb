"""A family: one row, whose code is generated into a package of its own."""

from pathlib import Path

from cla_convert.models.families import Family
from cla_convert.models.family_code import Code


def helium(package: str, folder: Path) -> Family:
    """The row."""
    return Family("helium", "Helium", Code("Helium"), code_folder=folder, code_package=package)
