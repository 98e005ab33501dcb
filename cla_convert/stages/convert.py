"""Stage 2, convert: write the model whose layers share keys and values."""

from typing import TYPE_CHECKING

from ..console import say
from ..errors import InputError
from ..files import path_of
from ..recipe import Recipe
from ..record import recorded
from ..results import ConvertResult
from ..run_folder import RunFolder
from ..same_recipe import continue_under
from .plan import plan_of
from .text import calibration

if TYPE_CHECKING:
    from ..conversion.plan import Plan


def convert(
    recipe: Recipe, folder: RunFolder, *, overwrite: bool = False, the_plan: "Plan | None" = None
) -> ConvertResult:
    """Convert the source model, unless it is done already.

    Args:
        recipe: its `source`, `convert` and `data` sections are used.
        folder: where the model and convert.json go.
        overwrite: replace an output of this tool that no convert.json is there of.
        the_plan: of this recipe, where it is made already.

    Raises:
        UsageError, InputError: as `plan`, or there is no room for the model, or another one took its place.
    """
    continue_under(recipe, folder)
    if folder.converted.exists() and (done := folder.convert.read()):
        _check_source(recipe, folder)
        _check_own(folder)
        say(f"found {folder.converted}")
        return done
    with recorded(recipe, folder, "convert"):
        return _convert(recipe, folder, overwrite, the_plan)


def _convert(recipe: Recipe, folder: RunFolder, overwrite: bool, the_plan: "Plan | None") -> ConvertResult:
    from ..conversion.convert import convert as execute
    from ..models.checkpoint import Checkpoint
    from ..models.fingerprint import fingerprint
    from ..models.writer import check_output
    from ..report.model_card import write_first_card

    check_output(folder.converted, overwrite=overwrite)  # before the minutes that calibration may take
    folder.convert.path.unlink(missing_ok=True)  # of a model that is gone; a new one must not stand beside it
    source = folder.source(recipe)
    checkpoint = Checkpoint.open(source)
    result = execute(
        the_plan or plan_of(recipe, folder),
        checkpoint,
        folder.converted,
        calibration=calibration(recipe, folder),
        max_shard_size=recipe.convert.max_shard_size,
        overwrite=overwrite,
        named={"model": _lasting(recipe.source.model), "revision": recipe.source.revision},
    )
    result["source"] |= recipe.source.model_dump(include={"model", "base_model", "revision"}) | checkpoint.origin
    result["model_fingerprint"] = fingerprint(folder.converted)
    write_first_card(folder.converted, result, source)
    return folder.convert.write(ConvertResult.model_validate(result))


def _check_source(recipe: Recipe, folder: RunFolder) -> None:
    """Refuse to go on with a model of another source: one that was changed in place, or moved on on the hub."""
    from ..models.fingerprint import fingerprint
    from ..models.writer import read_manifest

    known = read_manifest(folder.converted).get("source", {}).get("fingerprint")
    if known and known != fingerprint(source := folder.source(recipe)):
        raise InputError(
            f"{folder.converted} was made from other weights than {recipe.source.model} has now",
            why=f"{source} has changed since; results of the two would be compared with each other.",
            fix="Name the old ones (source.model, source.revision), give another --out, or --overwrite to start anew.",
        )


def _check_own(folder: RunFolder) -> None:
    """Refuse to go on with a model that was put in the place of the run's own: recipe and report tell of another."""
    from ..evaluation.stale import is_replaced

    if is_replaced(folder):
        raise InputError(
            f"{folder.converted} is not the model that this run converted",
            why=f"Weights, settings, tokenizer or code in it are not those that {folder.convert.path} tells of.",
            fix="Take out what was added, put back what was changed; or remove it, and what was trained from it: the "
            "run makes its own again. For a run with this one's settings, name them (convert.*) and give another "
            "--out, or --overwrite to start anew.",
        )


def _lasting(model: str) -> str:
    """A name that means the same from another folder."""
    return str(path_of(model).resolve()) if path_of(model).exists() else model
