"""uptrain: recover the quality of a converted model."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import data, data_json, say
from ..environment import rank
from ..errors import InputError, UsageError
from .app import AllowChanges, Json, Private, PushToHub, Recipe, Sets, app, destination, load, push

if TYPE_CHECKING:
    from ..recipe import Recipe as Schema
    from ..run_folder import TrainingFolder


@app.command()
def uptrain(
    model: Annotated[Path, typer.Argument(help="Folder of a converted model.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder for the uptrained model.", show_default=False)],
    recipe: Recipe = None,
    tokens: Annotated[str | None, typer.Option(help="Token budget, such as 26M.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Model to distil from; default: the recipe's teacher, else its source model.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue from the last checkpoint (the default if there is one).")
    ] = True,
    allow_changes: AllowChanges = None,
    sets: Sets = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Recover a converted model's quality on a token budget.

    Interrupted? The same command line resumes. Several GPUs? torchrun --nproc-per-node N -m cla_convert uptrain
    """
    from ..run_folder import RunFolder
    from ..stages.uptrain import uptrain as execute

    resolved = load(recipe, sets, {"train.tokens": tokens})
    if not resolved.recipe.train.tokens:
        raise UsageError("No token budget", fix="Give --tokens, for example --tokens 26M.")
    settings = _with_source(resolved.recipe, model, teacher)
    folder, leads = RunFolder.of_uptraining(model, out), rank() == 0
    _refuse_finished(folder.training)
    hub = destination(push_to_hub, private) if leads else None
    say(resolved.table())
    with folder.alone() if leads else nullcontext():  # under torchrun every process is here
        result = execute(settings, folder, fresh=not resume, allow_changes=allow_changes or ()).to_json()
    try:
        result |= push(hub, out)
    finally:
        data_json(result) if as_json else data(str(out))


def _refuse_finished(training: "TrainingFolder") -> None:
    """Raise InputError if there is a model that no interrupted run is of."""
    finished = training.result.path.exists() or not training.checkpoints.exists()
    if training.model.exists() and finished:  # else it was interrupted at the very end
        raise InputError(
            f"{training.model} exists", fix=f"Give another folder, or remove it and {training.path} to train again."
        )


def _with_source(settings: "Schema", model: Path, teacher: str | None) -> "Schema":
    """The recipe with a source model, which teaches unless train.teacher does. Raises UsageError if none is named."""
    source, train = settings.source, settings.train
    if teacher:
        train = train.model_copy(update={"teacher": None})
        source = source.model_copy(update={} if source.model == teacher else {"model": teacher, "revision": None})
    elif not source.model:
        named = train.teacher or _stand_in(settings, model)
        source = source.model_copy(update={"model": named})
    return settings.model_copy(update={"source": source, "train": train})


def _stand_in(settings: "Schema", model: Path) -> str:
    """What is named as the source model where nothing is asked of one. Raises UsageError where something is."""
    if settings.train.loss == "cross_entropy" and not any(source.generate for source in settings.data.sources):
        return str(model)
    raise UsageError(
        "No teacher", why="Distillation and `generate` need the source model.", fix="Give --teacher MODEL."
    )
