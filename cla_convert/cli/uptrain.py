"""uptrain: recover the quality of a converted model."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import command, data, data_json, say, warn
from ..environment import launched, may_restart, rank
from ..errors import ClaError, InputError, UsageError
from ..files import check_place
from .app import AllowChanges, AllowPickle, Json, Private, PushToHub, Quiet, Recipe, Sets, app, destination, load, push

if TYPE_CHECKING:
    from ..recipe import Recipe as Schema
    from ..run_folder import TrainingFolder


@app.command(epilog="Example: cla-convert uptrain out/ trained/ --tokens 26M")
def uptrain(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a converted model.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the uptrained model.", show_default=False)],
    recipe: Recipe = None,
    tokens: Annotated[str | None, typer.Option(metavar="N", help="Token budget, such as 26M.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Model to distil from; default: the recipe's teacher or source model, else what MODEL was made from.",
        ),
    ] = None,
    allow_pickle: AllowPickle = False,
    resume: Annotated[
        bool, typer.Option(help="Continue from the last checkpoint (the default if there is one).")
    ] = True,
    allow_changes: AllowChanges = None,
    sets: Sets = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Recover a converted model's quality on a token budget.

    Interrupted? The same command line resumes. Several GPUs? --set train.processes=N, or torchrun.
    """
    from ..models.verify import check_shares
    from ..run_folder import RunFolder, alone_around
    from ..stages.uptrain import uptrain as execute
    from ..training.schedule import check_steps

    out = out if out.name.strip(".") else out.resolve()
    folder, leads = RunFolder.of_uptraining(model, out), rank() == 0
    if recipe is None and folder.begun:  # the report that follows is about the run's own recipe
        recipe = str(folder.recipe)
    resolved = load(recipe, sets, {"train.tokens": tokens, "source.allow_pickle": allow_pickle or None})
    if not launched():  # a control is the source model itself
        check_shares(model)
    if out.exists() and out.samefile(model):
        raise UsageError(f"{out} is the model to train", fix="Name another folder for the result: MODEL DIR.")
    _refuse_taken(folder.training)
    if not resolved.recipe.train.tokens:
        raise UsageError("No token budget", fix="Give --tokens, for example --tokens 26M.")
    if not resume and may_restart():
        raise UsageError(
            "--no-resume and torchrun's --max-restarts do not go together",
            why="Every restart would begin anew.",
            fix="Remove the checkpoints yourself, or leave one of the two out.",
        )
    settings = _with_source(resolved.recipe, model, teacher)
    if not launched():
        _refuse_itself(settings, model)
    check_steps(settings.train)
    hub = destination(push_to_hub, private) if leads else None
    if not launched():  # who launched this has said it
        say(resolved.table())
    of_a_run = leads and not launched() and not folder.begun  # else who launched this, or the folder, holds the run
    with (
        alone_around(out) if of_a_run else nullcontext(),
        folder.alone() if leads else nullcontext(),  # under torchrun every process is here
    ):
        result = execute(settings, folder, fresh=not resume, allow_changes=allow_changes or ()).to_json()
    if leads and not launched():
        pickled = ["--allow-pickle"] if settings.source.allow_pickle else []
        chat = command("chat", out, "--beside", settings.source.model, *pickled)
        say(f"next        {command('eval', out)}\n            {chat}")
    try:
        result |= push(hub, out)
    finally:
        data_json(result) if as_json else data(str(out))


def _refuse_taken(training: "TrainingFolder") -> None:
    """Raise InputError if there can be no folder, or there is a model that no interrupted run is of."""
    check_place(training.model)
    finished = training.result.path.exists() or not training.checkpoints.exists()
    if training.model.exists() and finished:  # else it was interrupted at the very end
        # By name: the folder they lie in may be a run's, which holds MODEL too.
        made = [path for path in (training.model, training.result.path, training.checkpoints) if path.exists()]
        raise InputError(
            f"{training.model} exists",
            fix=f"Give another folder, or remove {' and '.join(map(str, made))} to train again.",
        )


def _with_source(settings: "Schema", model: Path, teacher: str | None) -> "Schema":
    """The recipe with a source model, which teaches unless train.teacher does. Raises UsageError if none is named."""
    source, train = settings.source, settings.train
    if teacher:
        train = train.model_copy(update={"teacher": None})
        source = source.model_copy(update={} if source.model == teacher else {"model": teacher, "revision": None})
    elif not source.model:
        known = {"model": train.teacher} if train.teacher else _recorded(settings, model) or _stand_in(settings, model)
        source = source.model_copy(update=known)
    return settings.model_copy(update={"source": source, "train": train})


def _refuse_itself(settings: "Schema", model: Path) -> None:
    """Raise UsageError for a model as its own teacher: no token would teach it anything."""
    name = settings.train.teacher or settings.source.model
    if settings.train.needs_teacher and Path(name).exists() and Path(name).samefile(model):
        raise UsageError(
            f"{name} would be its own teacher",
            why="Distillation brings a model nearer to another one.",
            fix="Give the model that it was converted from: --teacher MODEL.",
        )


def _recorded(settings: "Schema", model: Path) -> dict[str, str | bool | None] | None:
    """The source model that the converted one's manifest names, if it is there and the same still."""
    from ..models.checkpoint import Checkpoint
    from ..models.fingerprint import fingerprint
    from ..models.source import local_path, resolve_source
    from ..models.writer import read_manifest

    known = read_manifest(model).get("source") or {}
    name, revision = known.get("model"), known.get("revision")
    if not isinstance(name, str):
        return None
    reads_only = Checkpoint.open(model).around is None  # of a source that also sees images: its language model
    try:
        revision = None if local_path(name) else revision  # what lies there is compared below, whatever was said of it
        found = resolve_source(name, revision=revision, allow_pickle=settings.source.allow_pickle, text_only=reads_only)
    except ClaError as error:
        warn(f"{name}, which {model} was converted from, does not teach: {error.what}. {error.fix}")
        return None
    if fingerprint(found) != known.get("fingerprint"):
        warn(f"{name}, which {model} was converted from, has changed since: it does not teach")
        return None
    say(f"the teacher is {name}, which {model} was converted from")
    return {"model": name, "revision": revision, "text_only": reads_only}


def _stand_in(settings: "Schema", model: Path) -> dict[str, str | bool | None]:
    """What is named as the source model where nothing is asked of one. Raises UsageError where something is."""
    if not settings.train.needs_teacher and not settings.data.sampled:
        return {"model": str(model)}
    raise UsageError(
        "No teacher",
        why="Distillation and `generate` need the source model, and the one it was converted from cannot be had.",
        fix="Give --teacher MODEL.",
    )
