"""Uptraining: recover a converted model's quality on a token budget.

    uptrain: set up -> resume -> for every step: gradients, update, checkpoint, validation -> publish

The state of a run is its step: data order and learning rate are functions of it, everything else is in the
checkpoint. The same command line therefore resumes after Ctrl-C, SIGTERM or a crash, and on one CPU process ends with
the very same weights.
"""

import errno
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..console import human_count, progress, say
from ..environment import forget_peak_memory, machines
from ..errors import Interrupted
from ..evaluation.perplexity import token_perplexity
from ..files import read_rows
from ..models.writer import check_output
from ..recipe import Recipe
from ..results import TrainResult
from ..run_folder import TrainingFolder
from .alike import check_alike
from .data import TokenStore
from .divergence import (
    HISTORY,
    PATIENCE,
    all_finite,
    is_lost,
    lost,
    out_of_memory,
    ruined,
    spiked,
    steps_above,
)
from .metrics import Metrics, NoMetrics
from .micro_batch import ran_out
from .monitor import Monitor
from .parallel import Team
from .publish import publish, result_of
from .schedule import crossed
from .state import Position, TrainingStates
from .step import take_step
from .stop import StopRequest
from .trackers import open_trackers
from .trainer import Trainer, run_identity, set_up

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def uptrain(
    student_dir: Path,
    teacher_dir: Path,
    folder: TrainingFolder,
    recipe: Recipe,
    team: Team,
    *,
    text: Callable[[], TokenStore] | None = None,
    resume_command: str = "",
    fresh: bool = False,
    allow_changes: Collection[str] = (),
) -> TrainResult:
    """Train the model in `student_dir` on the recipe's token budget and publish it as `folder.model`.

    Args:
        student_dir: folder of the converted model (any causal language model works).
        teacher_dir: folder of the model to distil from, usually the source model.
        folder: holds checkpoints and metrics; its model appears whole or not at all.
        recipe: its `train` and `data` sections and the seed are used; `train.tokens` must not be 0.
        team: the processes that train, all of which call this; the first one writes the files.
        text: what gives the text; default: the recipe's data, as `store_for` reads it.
        resume_command: shown to the user on interruption.
        fresh: start over instead of resuming.
        allow_changes: settings that may differ from those of the checkpoint; see `TrainingStates`.

    Raises:
        InputError: data, models or `folder.model` are not usable, or memory will not do, before any training.
        TrainingError: the loss is not finite or has jumped, memory ran out, the disk is full, or the checkpoints are of
            another run.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    check_output(folder.model, overwrite=True)  # before hours of work, not after
    forget_peak_memory(team.device)
    trainer = set_up(student_dir, teacher_dir, recipe, team.device, team, text)
    with team.leader_first():  # hashes of large files are kept
        identity = run_identity(student_dir, teacher_dir, recipe, trainer)
    check_alike(team, recipe.train, identity, folder.path)
    checkpoints = TrainingStates(
        folder.checkpoints, identity, recipe.train.keep_checkpoints, team=team, allow_changes=allow_changes
    )
    if fresh:
        checkpoints.clear()
    position = _resume(trainer, checkpoints)
    metrics = Metrics(folder.metrics, position.step if position.step else None) if team.leads else NoMetrics()
    trackers = open_trackers(recipe.train.log_to, folder, position.step, identity) if team.leads else []
    with (
        _explained(trainer, checkpoints, resume_command),
        Monitor(trainer.budget, position.tokens, metrics, trackers) as monitor,
        StopRequest() as stop,
    ):
        position = Loop(trainer, checkpoints, metrics, monitor, stop, resume_command).run(position)
    result = result_of(trainer, position, read_rows(folder.metrics), checkpoints)
    publish(trainer, student_dir, folder.model, result, identity)
    return result


def _resume(trainer: Trainer, checkpoints: TrainingStates) -> Position:
    path = checkpoints.latest()
    if path is None:
        return Position()
    position = checkpoints.load(path, trainer.student, trainer.optimizers)
    say(f"resuming from {path} at {human_count(position.tokens)} of {human_count(trainer.budget.tokens)} tokens")
    return position


def _how_to_resume(command: str) -> str:
    if not command:
        return "Run the same command to resume."
    return f"Resume with: {command}" + (" (on every machine)" if machines() > 1 else "")


@contextmanager
def _explained(trainer: Trainer, checkpoints: TrainingStates, resume_command: str) -> Iterator[None]:
    """Turn a full disk, a full memory and a lost process into a TrainingError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise checkpoints.disk_trouble(str(error)) from error
    except RuntimeError as error:
        if is_lost(error):
            raise lost(error, checkpoints, resume_command) from error
        if not ran_out(error):
            raise
        raise out_of_memory(trainer, checkpoints, error) from error


@dataclass
class Loop:
    """Steps until the budget is spent, and what happens between them."""

    trainer: Trainer
    checkpoints: TrainingStates
    metrics: Metrics
    monitor: Monitor
    stop: StopRequest
    resume_command: str
    _due: bool = False
    """A checkpoint that waits for the loss to be trusted."""

    def run(self, position: Position) -> Position:
        """Train from a position to the end of the budget, which is returned.

        Raises:
            TrainingError: something is not finite, or the loss has jumped and stays.
            Interrupted: when asked to stop, after saving.
        """
        self._validate(position)
        while position.step < self.trainer.budget.steps:
            before = position
            position, row = take_step(self.trainer, position, self.checkpoints)
            self.monitor.step(row)
            self._save(before, position, trusted=not self._above(position))
            self._validate(position)
        return position

    def _above(self, position: Position) -> int:
        """How many of the last losses are above the limit. Raises TrainingError if it is too many."""
        losses = self.trainer.team.decide(self.metrics.losses[-HISTORY:])
        above = steps_above(losses, self.trainer.settings.spike)
        if above >= PATIENCE:
            raise spiked(position, self.trainer.budget, losses, self.checkpoints)
        return above

    def _save(self, before: Position, position: Position, *, trusted: bool) -> None:
        """Save at intervals, at the end, and where somebody asks to stop; then raises Interrupted."""
        budget, team = self.trainer.budget, self.trainer.team
        last, stopping = position.step == budget.steps, team.any(self.stop.requested)
        self._due = self._due or crossed(self.trainer.settings.checkpoint_every, before.tokens, position.tokens)
        if not (last or stopping or (self._due and trusted)):  # the start of a spike must not replace the good
            return
        self._due = False
        if team.any(not all_finite(self.trainer.parameters.values())):
            raise ruined(position, "The weights are not finite", self.checkpoints)
        self.metrics.sync()
        saved = self.checkpoints.save(position, self.trainer.student, self.trainer.optimizers)
        if stopping and not last:
            raise Interrupted(
                f"Interrupted at {human_count(position.tokens)} of {human_count(budget.tokens)} tokens",
                f"Everything is saved in {saved}.",
                _how_to_resume(self.resume_command),
            )

    def _validate(self, position: Position) -> None:
        """Validation perplexity at the start, at intervals and at the end; once a step, also after a resume."""
        trainer = self.trainer
        last = position.step == trainer.budget.steps
        before = trainer.budget.tokens_after(max(0, position.step - 1))
        if not (position.step == 0 or last or crossed(trainer.settings.validate_every, before, position.tokens)):
            return
        if trainer.team.decide(self.metrics.has_validation(position.step)):
            return
        with trainer.computing():  # every process does it all: the sequences are few, and the result is one
            size = min(8, trainer.micro_batch)
            rows = trainer.validation
            with progress(len(rows), "validating", unit="row", counts="rows", leave=False):
                score = trainer.team.run(token_perplexity, trainer.student, rows, batch_size=size)
        perplexity = score["perplexity"]
        if last and not math.isfinite(perplexity):
            raise ruined(position, "The validation perplexity is not finite", self.checkpoints)
        self.monitor.validation({"step": position.step, "tokens": position.tokens, "validation_perplexity": perplexity})
