"""Uptraining: recover a converted model's quality on a token budget.

    uptrain: set up -> resume -> for every step: gradients, update, checkpoint, validation -> export

The state of a run is its step: data order and learning rate are functions of it, everything else is in the
checkpoint. The same command line therefore resumes after Ctrl-C, SIGTERM or a crash, and on one CPU process ends with
the very same weights.
"""

import errno
import math
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..console import human_count, say, warn
from ..environment import peak_memory_bytes
from ..errors import Interrupted
from ..evaluation.perplexity import token_perplexity
from ..models.checkpoint import Checkpoint
from ..models.export import check_exportable, export_model
from ..models.writer import check_output
from ..recipe import Recipe
from ..results import TrainResult
from ..run_folder import TrainingFolder
from .data import TokenStore
from .health import HISTORY, PATIENCE, all_finite, not_finite, out_of_memory, ruined, spiked, steps_above
from .metrics import Metrics, NoMetrics, read_rows
from .monitor import Monitor
from .parallel import check_team, team, whole
from .parameters import peak_rate
from .schedule import crossed, learning_rate
from .sizing import ran_out
from .state import Checkpoints, Position
from .stop import StopRequest
from .torchrun import call_the_others
from .trackers import open_trackers
from .trainer import Trainer, run_identity, set_up

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def uptrain(
    student_dir: Path,
    teacher_dir: Path,
    folder: TrainingFolder,
    recipe: Recipe,
    *,
    device: str,
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
        device: `cpu`, `cuda`, `cuda:1`, ...
        text: what gives the text; default: the recipe's data, as `store_for` reads it.
        resume_command: shown to the user on interruption.
        fresh: start over instead of resuming.
        allow_changes: settings that may differ from those of the checkpoint; see `Checkpoints`.

    Under torchrun all processes take part; the first one calls the others, writes the files and has the result.

    Raises:
        UsageError: several processes cannot share the device.
        InputError: data, models or `folder.model` are not usable, or memory will not do, before any training.
        TrainingError: the loss is not finite or has jumped, memory ran out, the disk is full, or the checkpoints are of
            another run.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    arguments = dict(locals())
    check_output(folder.model, overwrite=True)  # before hours of work, not after
    check_team(device)
    call_the_others(arguments)
    with team(device) as crew:
        trainer = set_up(student_dir, teacher_dir, recipe, crew.device, crew, text)
        check_exportable(trainer.student.state_dict(), student_dir)
        identity = run_identity(student_dir, teacher_dir, recipe, trainer)
        checkpoints = Checkpoints(
            folder.checkpoints, identity, recipe.train.keep_checkpoints, team=crew, allow_changes=allow_changes
        )
        if fresh:
            checkpoints.clear()
        position = _resume(trainer, checkpoints)
        metrics = Metrics(folder.metrics, position.step if position.step else None) if crew.leads else NoMetrics()
        trackers = open_trackers(recipe.train.log_to, folder, position.step, identity) if crew.leads else []
        try:
            with Monitor(trainer.budget, position.tokens, metrics, trackers) as monitor, StopRequest() as stop:
                position = _train(trainer, position, checkpoints, metrics, monitor, stop, resume_command)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            raise checkpoints.disk_trouble(str(error)) from error
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise out_of_memory(trainer, checkpoints, error) from error
        result = _result(trainer, position, read_rows(folder.metrics), checkpoints.changes)
        state = _final_weights(trainer, student_dir)
    _tell(result.validation)
    if crew.leads:
        manifest = {"uptraining": result.to_json() | identity}
        export_model(state, student_dir, folder.model, manifest=manifest, overwrite=True)
    return result


def _tell(validation: list[dict[str, Any]]) -> None:
    """What training did to the perplexity of the validation text."""
    first, last = (validation[i]["validation_perplexity"] if validation else None for i in (0, -1))
    if first is None or last is None:
        return
    say(f"validation perplexity {first:.4g} -> {last:.4g}")
    if last > first:
        warn("the validation perplexity rose: lower train.learning_rate, or train for longer")


def _resume(trainer: Trainer, checkpoints: Checkpoints) -> Position:
    path = checkpoints.latest()
    if path is None:
        return Position()
    position = checkpoints.load(path, trainer.student, trainer.optimizers)
    say(f"resuming from {path} at {human_count(position.tokens)} of {human_count(trainer.budget.tokens)} tokens")
    return position


def _train(
    trainer: Trainer,
    position: Position,
    checkpoints: Checkpoints,
    metrics: Metrics,
    monitor: Monitor,
    stop: StopRequest,
    resume_command: str,
) -> Position:
    """Steps until the budget is spent; returns the final position."""
    settings, budget, team, due = trainer.settings, trainer.budget, trainer.team, False
    _validate_if_due(trainer, position, metrics, monitor, checkpoints)
    while position.step < budget.steps:
        before = position
        position, row = _step(trainer, position, checkpoints)
        monitor.step(row)
        losses = team.decide(metrics.losses[-HISTORY:])
        above = steps_above(losses, settings.spike)
        if above >= PATIENCE:
            raise spiked(position, budget, losses, checkpoints)
        last, stopping = position.step == budget.steps, team.any(stop.requested)
        due = due or crossed(settings.checkpoint_every, before.tokens, position.tokens)
        if last or stopping or (due and not above):  # what may be the start of a spike must not replace the good
            due = False
            if team.any(not all_finite(trainer.parameters.values())):
                raise ruined(position, "The weights are not finite", checkpoints)
            metrics.sync()
            saved = checkpoints.save(position, trainer.student, trainer.optimizers)
            if stopping and not last:
                raise Interrupted(
                    f"Interrupted at {human_count(position.tokens)} of {human_count(budget.tokens)} tokens",
                    f"Everything is saved in {saved}.",
                    f"Resume with: {resume_command}" if resume_command else "Run the same command to resume.",
                )
        _validate_if_due(trainer, position, metrics, monitor, checkpoints)
    return position


def _step(trainer: Trainer, position: Position, checkpoints: Checkpoints) -> tuple[Position, dict[str, Any]]:
    """One optimiser step; returns the new position and its row for metrics.jsonl."""
    start, settings, budget = time.perf_counter(), trainer.settings, trainer.budget
    tokens = budget.tokens_after(position.step + 1)
    rate = partial(
        learning_rate,
        position.tokens,
        tokens,
        budget.tokens,
        schedule=settings.schedule,
        warmup=settings.warmup,
        final=settings.final_lr,
    )
    # What is random in a step (dropout) depends on its number too: no generator has to be saved.
    torch.manual_seed(_step_seed(trainer, position.step))
    with trainer.computing():
        shares = _gradients(trainer, *budget.step_range(position.step))
    norm = whole(torch.nn.utils.clip_grad_norm_(trainer.parameters.values(), settings.clip))
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate(peak=group["peak"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    # The only time that the host waits for the device, after all of the step is under way. If something is not finite
    # it is too late for the weights in memory, but not for the checkpoint.
    loss, *parts, norm = torch.cat((shares.sum(0), norm[None])).tolist()
    if not all(map(math.isfinite, (loss, norm))):
        raise not_finite(trainer, position, shares[..., 0], norm, checkpoints)
    seconds = time.perf_counter() - start
    first = loss if position.first_loss is None else position.first_loss
    speed = (tokens - position.tokens) / seconds
    row = {
        "step": position.step + 1,
        "tokens": tokens,
        "loss": loss,
        **(dict(zip(trainer.objective.parts, parts, strict=True)) if len(parts) > 1 else {}),
        "lr": rate(peak=peak_rate("shared", settings)),
        "grad_norm": norm,
        "tokens_per_second": speed,
        **({"mfu": mfu} if (mfu := trainer.utilisation(speed)) else {}),
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "seconds": position.seconds + seconds,
    }
    return Position(position.step + 1, tokens, position.seconds + seconds, first, loss), row


def _gradients(trainer: Trainer, first: int, end: int) -> torch.Tensor:
    """Accumulate the gradients of sequences first .. end-1.

    Every micro-batch is divided by the targets of the whole step: the sum is the mean over tokens however it is cut.

    Returns:
        Each pass's share of the loss and of its parts, of all processes: [passes, 1 + parts].
    """
    denominator = (end - first) * trainer.objective.targets(trainer.budget.length)
    denominator -= trainer.sequences.boundaries(end - first, first)
    shares, done = [], first / trainer.budget.sequences
    for part in trainer.team.share(first, end, trainer.micro_batch):
        batch = _batch(trainer, part or range(first, first + 1))
        loss, record = trainer.team.run(trainer.objective, trainer.student, *batch, denominator, done)
        (loss * bool(part)).backward()
        shares.append(record * bool(part))
    return trainer.team.gather(torch.stack(shares))


def _step_seed(trainer: Trainer, step: int) -> int:
    return int(np.random.SeedSequence([trainer.seed, step, trainer.team.rank]).generate_state(1)[0])


def _batch(trainer: Trainer, part: range) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sequences `part` on the device, [B, T], and their positions where documents are kept apart."""
    arrays = (source(len(part), part.start) for source in (trainer.sequences.rows, trainer.sequences.positions))
    ids, positions = (None if array is None else _to_device(trainer, torch.from_numpy(array)) for array in arrays)
    assert ids is not None
    return ids, positions


def _to_device(trainer: Trainer, tensor: torch.Tensor) -> torch.Tensor:
    """A copy for which the host does not wait."""
    return (tensor.pin_memory() if trainer.precision.device_type == "cuda" else tensor).to(
        trainer.device, non_blocking=True
    )


def _validate_if_due(
    trainer: Trainer, position: Position, metrics: Metrics, monitor: Monitor, checkpoints: Checkpoints
) -> None:
    """Validation perplexity at the start, at intervals and at the end; once a step, also after a resume."""
    before = trainer.budget.tokens_after(max(0, position.step - 1))
    ends = position.step in (0, trainer.budget.steps)
    if not (ends or crossed(trainer.settings.validate_every, before, position.tokens)):
        return
    if trainer.team.decide(metrics.has_validation(position.step)):
        return
    with trainer.computing():  # every process does it all: the sequences are few, and the result is one
        size = min(8, trainer.micro_batch)
        score = trainer.team.run(token_perplexity, trainer.student, trainer.validation, batch_size=size)
    if position.step == trainer.budget.steps and not math.isfinite(score["perplexity"]):
        raise ruined(position, "The validation perplexity is not finite", checkpoints)
    monitor.validation({"step": position.step, "tokens": position.tokens, "validation_perplexity": score["perplexity"]})


def _final_weights(trainer: Trainer, student_dir: Path) -> dict[str, torch.Tensor]:
    """The state dict to export, on process 0. What was not trained comes from the files: in memory it is cast."""
    if trainer.team.size > 1:
        return trainer.team.whole_state(trainer.student)  # nothing is cast there
    stored = Checkpoint.open(student_dir)
    state = trainer.student.state_dict(keep_vars=True)
    frozen = {name for name, tensor in state.items() if not tensor.requires_grad and name in stored.tensors}
    return {name: stored.read(name) if name in frozen else tensor for name, tensor in state.items()}


def _result(
    trainer: Trainer, position: Position, rows: list[dict[str, Any]], changes: list[dict[str, Any]]
) -> TrainResult:
    found = {
        "tokens": position.tokens,
        "steps": position.step,
        "seconds": position.seconds,
        "tokens_per_second": position.tokens / position.seconds,
        "mfu": trainer.utilisation(position.tokens / position.seconds),
        "compiled": trainer.compiled,
        "objective": trainer.settings.loss,
        "loss": position.loss,
        "first_loss": position.first_loss,
        "validation": [row for row in rows if "validation_perplexity" in row],
        "parameters_trained": sum(p.numel() for p in trainer.parameters.values()),
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "expected_memory_bytes": round(trainer.forecast.needs(trainer.micro_batch).peak),
        "device": trainer.device,
        "processes": trainer.team.size,
        "precision": trainer.precision.name,
        "data_digest": trainer.data.digest,
        "data": trainer.data.info,
        "changes": changes,
    }
    return TrainResult.model_validate(found)
