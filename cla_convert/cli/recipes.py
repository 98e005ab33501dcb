"""Verbs that inform: env, recipes ls|show|reference|cp."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import data, data_json, page, say
from ..errors import UsageError
from .app import Json, Quiet, app, recipes_app

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe.", show_default=False)]


@app.command(epilog="Example: cla-convert env --json > env.json")
def env(as_json: Json = False, quiet: Quiet = False) -> None:
    """Print versions and hardware, for bug reports."""
    say("asking torch for the devices ...")
    from ..environment import hardware, versions

    result = {"versions": versions(), "hardware": hardware()}
    if as_json:
        data_json(result)
    else:
        page("\n".join(f"{name:<14}{value}" for part in result.values() for name, value in part.items()))


@recipes_app.command("ls", epilog="Example: cla-convert recipes ls")
def recipes_ls() -> None:
    """List the shipped recipes."""
    from ..recipes import list_recipes

    page("\n".join(f"{name:<16}{title}" for name, title in list_recipes().items()))


@recipes_app.command("show", epilog="Example: cla-convert recipes show demo")
def recipes_show(name: Name) -> None:
    """Print a shipped recipe."""
    from ..recipes import find_recipe

    data(find_recipe(name).read_text(encoding="utf-8").rstrip())


@recipes_app.command("reference", epilog="Example: cla-convert recipes reference > recipe.md")
def recipes_reference() -> None:
    """Print every setting of a recipe, as Markdown."""
    from ..recipes import reference

    data(reference().rstrip())


@recipes_app.command("cp", epilog="Example: cla-convert recipes cp smollm2-135m mine.yaml")
def recipes_cp(
    name: Name,
    to: Annotated[
        Path, typer.Argument(metavar="FILE", help="File or folder; default: this folder.", show_default=False)
    ] = Path(),
) -> None:
    """Copy a shipped recipe, to edit it."""
    import shutil

    from ..recipes import find_recipe

    recipe = find_recipe(name)
    out = to / recipe.name if to.is_dir() else to
    if out.exists():
        raise UsageError(f"{out} exists", fix="Give another name.")
    if not out.parent.is_dir():
        raise UsageError(f"There is no folder {out.parent}", fix="Make it first, or give another place.")
    data(str(shutil.copy(recipe, out)))
