"""Stage 3, uptrain: recover what the conversion cost, on a token budget."""

import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..console import quiet, say
from ..environment import command_line, launched, pick_device, rank, world_size
from ..errors import InputError
from ..models.checkpoint import Checkpoint
from ..models.export import load_tokenizer
from ..models.self_test import check_interface
from ..recipe import Recipe
from ..record import recorded
from ..results import TrainResult
from ..run_folder import RunFolder, TrainingFolder
from ..same_recipe import continue_under
from .disk import check_room
from .text import say_untaught, text, text_tokens


def uptrain(
    recipe: Recipe, folder: RunFolder, *, fresh: bool = False, allow_changes: Collection[str] = ()
) -> TrainResult:
    """Train the converted model on the recipe's token budget, unless it is done already; an interrupted run goes on.

    Args:
        recipe: its `train` and `data` sections are used; `train.tokens` must not be 0.
        folder: holds the converted model; the uptrained one and its checkpoints go there.
        fresh: start over instead of resuming.
        allow_changes: settings that may differ from those of the folder and the checkpoint.

    Raises:
        UsageError: the folder is of another recipe.
        UsageError, InputError, TrainingError, Interrupted: as `training.loop.uptrain`.
    """
    continue_under(recipe, folder, allow_changes)
    return _train(_Training(recipe, folder, folder.converted, folder.training, fresh, allow_changes))


def uptrain_control(recipe: Recipe, folder: RunFolder, *, allow_changes: Collection[str] = ()) -> TrainResult | None:
    """Train the source model likewise, where the recipe asks for it: what CLA cost is the difference."""
    continue_under(recipe, folder, allow_changes)
    if recipe.train.needs_control:
        say("control: the source model on the same tokens with the same loss")
        _forget_other_control(recipe, folder)
        return _train(_Training(recipe, folder, folder.source(recipe), folder.control, False, allow_changes))
    if recipe.train.control and recipe.train.tokens:
        say("control: distilling the source model from itself starts at its goal, so the control is the source")
    return None


def _forget_other_control(recipe: Recipe, folder: RunFolder) -> None:
    """A control that was trained otherwise than the uptrained model is made anew; on other text it cannot be.

    Raises:
        InputError: the recipe's text is not what the uptrained model was trained on.
    """
    from ..evaluation.stale import unlike_control

    trained, control = folder.training.result.read(), folder.control
    if unlike := unlike_control(folder, auto_rates=recipe.train.learning_rate == "auto"):
        say(f"{control.model} was trained otherwise ({', '.join(unlike)}): it is made anew")
        control.clear()
    if trained and not control.model.exists() and text(recipe, folder).digest != trained.data_digest:
        raise InputError(
            "The control cannot be trained on the text of the uptrained model",
            why="data.sources give other tokens now, so the two would differ in what they have read.",
            fix="Put the text back as it was, or give another --out; train.control=false goes on without a control.",
        )


@dataclass(frozen=True)
class _Training:
    """One model's uptraining: `student` into `training`."""

    recipe: Recipe
    folder: RunFolder
    student: Path
    training: TrainingFolder
    fresh: bool
    allow_changes: Collection[str]


def _train(it: _Training) -> TrainResult:
    """In several processes where the recipe asks for them, unless it is done already."""
    recipe, folder, training = it.recipe, it.folder, it.training
    if training.model.exists() and (done := training.result.read()):
        _refuse_another(training, it.student)
        say(f"found {training.model}")
        training.finish(keep=recipe.train.keep_checkpoints_after_success)  # in case the end of it was interrupted
        return done
    with recorded(recipe, folder, "uptrain"):
        if rank() == 0:
            training.result.path.unlink(missing_ok=True)  # of a model that was removed since
            check_interface(Checkpoint.open(it.student).config.get("model_type", ""))  # or nothing can be counted
            check_room(recipe, training, it.student, fresh=it.fresh)
        return _train_together(it) if recipe.train.processes > 1 and world_size() == 1 else _train_here(it)


def _refuse_another(training: TrainingFolder, student: Path) -> None:
    """Refuse to go on with a model that began as another one than `student` is now."""
    from ..evaluation.stale import trained_from_another

    if trained_from_another(training, student):
        made = " and ".join(str(path) for path in (training.model, training.checkpoints) if path.exists())
        raise InputError(
            f"{training.model} was trained from another model than {student}",
            why="That one was replaced or changed since; results of both would be told as one model's.",
            fix=f"Put the other one back, or remove {made}: then this one is trained.",
        )


def _train_here(it: _Training) -> TrainResult:
    """In this process, which may be one of several."""
    from ..training.loop import uptrain as train
    from ..training.parallel import team

    recipe, folder, training = it.recipe, it.folder, it.training
    with team(pick_device(recipe.device), recipe.train.shard_degree) as crew:
        with crew.leader_first():
            teacher = folder.teacher(recipe)
        if crew.leads and not launched():
            say_untaught(recipe, load_tokenizer(folder.source(recipe)))
        # Now: hours later files may have moved.
        there = text_tokens(recipe, folder.source(recipe)) if crew.leads else None
        result = train(
            it.student,
            teacher,
            training,
            recipe,
            crew,
            text=lambda: text(recipe, folder),
            resume_command=command_line(),
            fresh=it.fresh,
            allow_changes=it.allow_changes,
        )
    result = result.model_copy(update={"text_tokens": there})
    if crew.leads:
        if training is folder.training:  # of the control nothing is published
            _card(training, result)
        training.result.write(result)
        training.finish(keep=recipe.train.keep_checkpoints_after_success)
    return result


def _train_together(it: _Training) -> TrainResult:
    """The same by the verb `uptrain`, in processes of their own."""
    from ..training.launch import launch

    with tempfile.TemporaryDirectory() as scratch:
        resolved = RunFolder(Path(scratch))
        resolved.save_recipe(it.recipe)
        options = [word for name in it.allow_changes for word in ("--allow-change", name)]
        options += [*(["--no-resume"] if it.fresh else []), *(["-q"] if quiet() else [])]
        line = ["uptrain", str(it.student), str(it.training.model), "--recipe", str(resolved.recipe), *options]
        launch(line, it.recipe.train.processes, it.folder.path)
    result = it.training.result.read()
    assert result is not None, "uptrain ends with it"
    return result


def _card(training: TrainingFolder, result: TrainResult) -> None:
    """Say on the model's card how it was trained; the report will say what came of it."""
    from ..report.model_card import described, source_card, write_model_card

    card = described(training.model, result.to_json() | {"loss_name": result.objective})
    write_model_card(training.model, card | {"command": command_line()}, source_card(training.model))
