"""Verbs that train: uptrain, and run, which does everything."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import data, data_json, say
from ..environment import command_line
from ..errors import InputError, UsageError
from .app import (
    AllowChanges,
    Gate,
    GateStrict,
    Json,
    Private,
    PushToHub,
    Sets,
    TaskData,
    app,
    destination,
    enforce_gate,
    gate_mode,
    push,
)

if TYPE_CHECKING:
    from ..recipe import Recipe


@app.command()
def uptrain(
    model: Annotated[Path, typer.Argument(help="Folder of a converted model.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder for the uptrained model.", show_default=False)],
    recipe: Annotated[str | None, typer.Option(help="Recipe file, or the name of a shipped one.")] = None,
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

    Interrupted? The same command line resumes. Several GPUs? torchrun --nproc-per-node N -m cla_convert.cli uptrain
    """
    from ..environment import pick_device
    from ..files import alone_in, write_json
    from ..models.source import resolve_source
    from ..recipe_file import load_recipe
    from ..recipes import find_recipe
    from ..report.model_card import described, source_card, write_model_card
    from ..training.loop import uptrain as train
    from ..training.state import finish

    overrides = [*(sets or []), *([f"train.tokens={tokens}"] if tokens else [])]
    resolved = load_recipe(find_recipe(recipe) if recipe else None, overrides)
    settings = resolved.recipe
    if not settings.train.tokens:
        raise UsageError("No token budget", fix="Give --tokens, for example --tokens 26M.")
    source = teacher or settings.train.teacher or settings.source.model or _without_teacher(model, settings)
    revision = settings.source.revision if source == settings.source.model else None
    state = out.with_name(f"{out.name}.state")
    done = (state / "train.json").exists()
    if out.exists() and (done or not (state / "checkpoints").exists()):  # else it was interrupted at the very end
        raise InputError(f"{out} exists", fix=f"Give another folder, or remove it and {state} to train again.")
    hub = destination(push_to_hub, private)
    say(resolved.table())
    with alone_in(state):
        (state / "train.json").unlink(missing_ok=True)
        result = train(
            model,
            resolve_source(source, revision=revision, allow_pickle=settings.source.allow_pickle),
            out,
            settings,
            run_dir=state,
            device=pick_device(settings.device),
            resume_command=command_line(),
            fresh=not resume,
            allow_changes=allow_changes or (),
        )
        card = described(out, result | {"loss_name": result["objective"]}) | {"command": command_line()}
        write_model_card(out, card, source_card(out))
        write_json(state / "train.json", result)
        finish(state, keep=settings.train.keep_checkpoints_after_success)
    try:
        result |= push(hub, out)
    finally:
        data_json(result) if as_json else data(str(out))


def _without_teacher(model: Path, settings: "Recipe") -> str:
    """What stands in for a teacher that nothing is asked of. Raises UsageError where one is needed."""
    if not settings.train.needs_teacher and not any(source.generate for source in settings.data.sources):
        return str(model)
    raise UsageError(
        "No teacher", why="Distillation and `generate` need the source model.", fix="Give --teacher MODEL."
    )


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(help="Recipe file, or the name of a shipped one (demo).", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Run folder; rerunning the same line resumes.", show_default=False)],
    sets: Sets = None,
    until: Annotated[
        str, typer.Option(help="Stop after this stage: plan, convert, uptrain, eval or report.")
    ] = "report",
    overwrite: Annotated[bool, typer.Option(help="Start the run folder anew.")] = False,
    allow_changes: AllowChanges = None,
    task_data: TaskData = None,
    gate: Gate = False,
    gate_strict: GateStrict = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Do it all: plan, convert, uptrain, evaluate, report.

    Rerunning the same line resumes where it stopped. Several GPUs? torchrun --nproc-per-node N -m cla_convert.cli run
    """
    from ..errors import did_you_mean
    from ..recipe_file import load_recipe
    from ..recipes import find_recipe

    overrides = [*(sets or [])]
    overrides += [f"eval.task_data={json.dumps(task_data)}"] if task_data else []
    overrides += [f"eval.gate={json.dumps(mode)}"] if (mode := gate_mode(gate, gate_strict)) else []
    resolved = load_recipe(find_recipe(recipe), overrides)
    from .. import pipeline

    if until not in pipeline.STAGES:
        raise UsageError(
            f"There is no stage {until!r}.{did_you_mean(until, pipeline.STAGES)}", fix=", ".join(pipeline.STAGES)
        )
    if (gate or gate_strict) and until not in ("eval", "report"):
        raise UsageError("--gate has nothing to judge", why=f"--until {until} stops before the evaluation.")
    if push_to_hub and until == "plan":
        raise UsageError("--push-to-hub has nothing to upload", why="--until plan stops before there is a model.")
    hub = destination(push_to_hub, private)
    result = pipeline.run(resolved, out, until=until, overwrite=overwrite, allow_changes=allow_changes or ())
    if as_json:
        data_json(result)
    elif until == "report":
        data((out / "report.md").read_text(encoding="utf-8"))
    if until in ("eval", "report"):
        enforce_gate(out, resolved.recipe.eval.gate)
    trained = resolved.recipe.train.tokens and until != "convert"
    push(hub, out / ("uptrained" if trained else "converted"))  # not reached by a model that failed the gate


def take_part() -> None:
    """What every process but the first does under torchrun: wait for its call, uptrain with it, leave."""
    from ..training.torchrun import wait_for_call

    arguments = wait_for_call()
    if arguments is not None:
        from ..training.loop import uptrain

        uptrain(**arguments)
