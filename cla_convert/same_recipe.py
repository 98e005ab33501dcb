"""Whether a run folder may be continued: under the recipe it was made with, unless the user accepts what changed."""

from collections.abc import Collection

from .environment import launched, on_command_line, rank
from .errors import UsageError
from .files import is_place, path_of
from .recipe import FREE, NAMED, PLACES, Recipe, on_resume
from .recipe_file import flatten, is_named, read_yaml, told
from .removed import without_removed
from .run_folder import RunFolder


def continue_under(recipe: Recipe, folder: RunFolder, allow_changes: Collection[str] = ()) -> None:
    """What every stage that makes something begins with: `check_same_recipe`, then record the recipe in the folder.

    Not where a verb was given a single model: that is of no run. Raises UsageError.
    """
    if folder.converts and not launched() and rank() == 0:  # else another process has done it
        check_same_recipe(folder, recipe, False, allow_changes)
        folder.save_recipe(recipe)


def check_same_recipe(folder: RunFolder, recipe: Recipe, overwrite: bool, allow_changes: Collection[str] = ()) -> None:
    """Refuse to continue a run folder under another recipe, or to take over a folder that holds no run.

    Args:
        folder: the run folder, which may not exist yet.
        recipe: the recipe now.
        overwrite: whether the folder is to be started anew.
        allow_changes: names of settings or sections that may differ, where the schema marks them so.

    Raises:
        UsageError: naming every setting that differs, with its value before and after; or what starting anew would
            remove and the recipe reads.
    """
    path = folder.path
    if path.is_file():
        raise UsageError(f"{path} is a file", fix=f"Give {_a_folder()}.")
    if path.is_dir() and any(path.iterdir()) and not folder.begun:
        raise UsageError(f"{path} is not empty and holds no run", fix=f"Give {_another_folder()}.")
    if overwrite and (needed := folder.lost_with(recipe)):
        raise UsageError(
            f"{needed} would be removed before it is read",
            why="It lies in the folder that is to be started anew, and the recipe names it.",
            fix=f"Move it, or give {_another_folder()}.",
        )
    if overwrite or not folder.begun or not folder.has_work:
        return
    changed = {name: told for name, told in _changes(folder, recipe).items() if on_resume(name) is not FREE}
    can_be_allowed = {name for name in changed if _can_be_allowed(name, folder)}
    refused = [name for name in changed if name not in can_be_allowed or not is_named(name, allow_changes)]
    if refused:
        raise UsageError(
            f"{path} holds a run of another recipe",
            why="\n       ".join(changed[name] for name in refused),
            fix=_what_to_do([name for name in refused if name in can_be_allowed]) + _moved(folder, recipe, refused),
        )


def check_reported(folder: RunFolder, recipe: Recipe) -> None:
    """Raise UsageError if the results in a folder are of another recipe: of other settings of the evaluation, too."""
    if not folder.begun:
        return
    if changed := {name: told for name, told in _changes(folder, recipe).items() if name != "device"}:
        raise UsageError(
            f"{folder.path} holds results of another recipe",
            why="\n       ".join(changed.values()),
            fix=f"Evaluate with this one first, or give the one it was made with: {folder.recipe}",
        )


def _changes(folder: RunFolder, recipe: Recipe) -> dict[str, str]:
    """Every setting that differs from the folder's, and how."""
    before = flatten(without_removed(read_yaml(folder.recipe)))
    after = flatten(recipe.model_dump(mode="json"))
    return {
        name: told(name, before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }


def _moved(folder: RunFolder, recipe: Recipe, refused: list[str]) -> str:
    """What to do if a source model was only moved: its weights are compared on resume, wherever they lie."""
    before, after = str(flatten(read_yaml(folder.recipe)).get("source.model")), recipe.source.model
    exist = [path_of(name).exists() for name in (before, after)]
    if refused != ["source.model"] or exist != [False, True] or not is_place(before):
        return ""
    return f" If the model was only moved, leave a link to it at {before} (ln -s) and name that."


def _can_be_allowed(name: str, folder: RunFolder) -> bool:
    if folder.training.result.path.exists():
        return False
    mark = on_resume(name)
    return mark is NAMED or (mark is PLACES and not folder.training.checkpoints.exists())


def _what_to_do(can_be_allowed: list[str]) -> str:
    """With a run of another recipe, of which so much may differ."""
    if not on_command_line():
        accept = f"Call uptrain with allow_changes={can_be_allowed!r}, or give" if can_be_allowed else "Give"
        return f"{accept} {_another_folder()}."
    options = " ".join(f"--allow-change {name}" for name in can_be_allowed)
    accept = f"Accept it with {options}, give" if options else "Give"
    return f"{accept} {_another_folder()}, or --overwrite to start this folder anew."


def _a_folder() -> str:
    return "a folder for --out" if on_command_line() else "a folder"


def _another_folder() -> str:
    return "another --out" if on_command_line() else "another folder"
