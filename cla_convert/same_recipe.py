"""Whether a run folder may be continued: under the recipe it was made with, unless the user accepts what changed."""

from collections.abc import Collection

from .errors import UsageError
from .recipe import FREE, NAMED, PLACES, Recipe, on_resume
from .recipe_file import flatten, is_named, read_yaml, told
from .removed import without_removed
from .run_folder import RunFolder


def check_same_recipe(folder: RunFolder, recipe: Recipe, overwrite: bool, allow_changes: Collection[str] = ()) -> None:
    """Refuse to continue a run folder under another recipe, or to take over a folder that holds no run.

    Args:
        folder: the run folder, which may not exist yet.
        recipe: the recipe now.
        overwrite: whether the folder is to be started anew.
        allow_changes: names of settings or sections that may differ, where the schema marks them so.

    Raises:
        UsageError: naming every setting that differs, with its value before and after.
    """
    path = folder.path
    if path.is_file():
        raise UsageError(f"{path} is a file", fix="Give a folder for --out.")
    if path.is_dir() and any(path.iterdir()) and not folder.begun:
        raise UsageError(f"{path} is not empty and holds no run", fix="Give another folder for --out.")
    if overwrite or not folder.begun or not folder.has_work:
        return
    before = flatten(without_removed(read_yaml(folder.recipe)))
    after = flatten(recipe.model_dump(mode="json"))
    changed = {
        name: told(name, before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and on_resume(name) is not FREE
    }
    can_be_allowed = {name for name in changed if _can_be_allowed(name, folder)}
    refused = [name for name in changed if name not in can_be_allowed or not is_named(name, allow_changes)]
    if refused:
        options = " ".join(f"--allow-change {name}" for name in refused if name in can_be_allowed)
        raise UsageError(
            f"{path} holds a run of another recipe",
            why="; ".join(changed[name] for name in refused),
            fix=f"{f'Accept it with {options}, give' if options else 'Give'} another --out, or --overwrite to start "
            "this folder anew.",
        )


def _can_be_allowed(name: str, folder: RunFolder) -> bool:
    if folder.training.result.path.exists():
        return False
    mark = on_resume(name)
    return mark is NAMED or (mark is PLACES and not folder.training.checkpoints.exists())
