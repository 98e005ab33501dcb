"""Uptraining: recover a converted model's quality on a token budget.

    uptrain: set up -> resume -> for every step: gradients, update, checkpoint, validation -> export

The state of a run is its step: data order and learning rate are functions of it, everything else is in the
checkpoint. The same command line therefore resumes after Ctrl-C, SIGTERM or a crash, and on one CPU process ends with
the very same weights.
"""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..console import human_count, say
from ..environment import peak_memory_bytes
from ..errors import Interrupted
from ..evaluation.perplexity import token_perplexity
from ..models.checkpoint import Checkpoint
from ..models.export import check_exportable, export_model
from ..models.writer import check_output
from ..recipe import Recipe
from .health import PATIENCE, not_finite, spiked, steps_above
from .metrics import Metrics, read_rows
from .monitor import Monitor
from .schedule import crossed, learning_rate
from .state import Checkpoints, Position
from .stop import StopRequest
from .trackers import open_trackers
from .trainer import Trainer, run_identity, set_up


def uptrain(
    student_dir: Path,
    teacher_dir: Path,
    out_dir: Path,
    recipe: Recipe,
    *,
    run_dir: Path,
    device: str,
    resume_command: str = "",
    fresh: bool = False,
) -> dict[str, Any]:
    """Train the model in `student_dir` on the recipe's token budget and publish it as `out_dir`.

    Args:
        student_dir: folder of the converted model (any causal language model works).
        teacher_dir: folder of the model to distil from, usually the source model.
        out_dir: folder of the result; appears whole or not at all.
        recipe: its `train` and `data` sections and the seed are used; `train.tokens` must not be 0.
        run_dir: holds checkpoints/ and metrics.jsonl.
        device: `cpu`, `cuda`, `cuda:1`, ...
        resume_command: shown to the user on interruption.
        fresh: start over instead of resuming.

    Returns:
        tokens, steps, seconds, tokens_per_second, loss, first_loss, validation, peak_memory_bytes and what was used.

    Raises:
        InputError: data, models or `out_dir` are not usable, before any training.
        TrainingError: the loss is not finite or has jumped, the disk is full, or the checkpoints are of another run.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    check_output(out_dir, overwrite=True)  # before hours of work, not after
    trainer = set_up(student_dir, teacher_dir, recipe, device)
    check_exportable(trainer.student.state_dict(), student_dir)
    identity = run_identity(student_dir, teacher_dir, recipe, trainer)
    checkpoints = Checkpoints(run_dir / "checkpoints", identity, recipe.train.keep_checkpoints)
    if fresh:
        checkpoints.clear()
    position = _resume(trainer, checkpoints)
    metrics = Metrics(run_dir / "metrics.jsonl", position.step if position.step else None)
    trackers = open_trackers(recipe.train.log_to, run_dir, position.step, identity)
    with Monitor(trainer.budget, position.tokens, metrics, trackers) as monitor, StopRequest() as stop:
        position = _train(trainer, position, checkpoints, metrics, monitor, stop, resume_command)
    result = _result(trainer, position, read_rows(run_dir / "metrics.jsonl"))
    weights = _final_weights(trainer, student_dir)
    export_model(weights, student_dir, out_dir, manifest={"uptraining": result | identity}, overwrite=True)
    return result


def _resume(trainer: Trainer, checkpoints: Checkpoints) -> Position:
    path = checkpoints.latest()
    if path is None:
        return Position()
    position = checkpoints.load(path, trainer.parameters, trainer.optimizer)
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
    settings, budget, due = trainer.settings, trainer.budget, False
    _validate_if_due(trainer, position, metrics, monitor)
    while position.step < budget.steps:
        before = position
        position, row = _step(trainer, position, checkpoints)
        monitor.step(row)
        above = steps_above(metrics.losses, settings.spike)
        if above >= PATIENCE:
            raise spiked(position, budget, metrics.losses, checkpoints)
        last = position.step == budget.steps
        due = due or crossed(settings.checkpoint_every, before.tokens, position.tokens)
        if last or stop.requested or (due and not above):  # what may be the start of a spike must not replace the good
            due = False
            metrics.sync()
            saved = checkpoints.save(position, trainer.parameters, trainer.optimizer)
            if stop.requested and not last:
                raise Interrupted(
                    f"Interrupted at {human_count(position.tokens)} of {human_count(budget.tokens)} tokens",
                    f"Everything is saved in {saved}.",
                    f"Resume with: {resume_command}" if resume_command else "Run the same command to resume.",
                )
        _validate_if_due(trainer, position, metrics, monitor)
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
    with trainer.precision.working_copy(trainer.student):
        shares = _gradients(trainer, *budget.step_range(position.step))
    norm = torch.nn.utils.clip_grad_norm_(trainer.parameters.values(), settings.clip)
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate(peak=group["peak"])
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    # The only time that the host waits for the device, after all of the step is under way. If something is not finite
    # it is too late for the weights in memory, but not for the checkpoint.
    loss, *parts, norm = torch.cat((shares.sum(0), norm[None])).tolist()
    if not all(map(math.isfinite, (loss, norm))):
        raise not_finite(position, budget, trainer.micro_batch, shares[:, 0], norm, checkpoints)
    seconds = time.perf_counter() - start
    first = loss if position.first_loss is None else position.first_loss
    speed = (tokens - position.tokens) / seconds
    row = {
        "step": position.step + 1,
        "tokens": tokens,
        "loss": loss,
        **(dict(zip(trainer.objective.parts, parts, strict=True)) if len(parts) > 1 else {}),
        "lr": rate(peak=settings.learning_rate),
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
        Each micro-batch's share of the loss and of its parts, [micro-batches, 1 + parts].
    """
    denominator = (end - first) * trainer.objective.targets(trainer.budget.length)
    shares = []
    for start in range(first, end, trainer.micro_batch):
        ids = _batch(trainer, start, min(start + trainer.micro_batch, end))
        loss, parts = trainer.objective(trainer.student, ids, denominator)
        loss.backward()
        shares.append(torch.cat((loss.detach()[None], parts)))
    return torch.stack(shares)


def _batch(trainer: Trainer, first: int, end: int) -> torch.Tensor:
    """Sequences first .. end-1 on the device, [B, T]; the host does not wait for the copy."""
    ids = torch.from_numpy(trainer.sequences.rows(end - first, first))
    if trainer.precision.device_type == "cuda":
        ids = ids.pin_memory()
    return ids.to(trainer.device, non_blocking=True)


def _validate_if_due(trainer: Trainer, position: Position, metrics: Metrics, monitor: Monitor) -> None:
    """Validation perplexity at the start, at intervals and at the end; once a step, also after a resume."""
    before = trainer.budget.tokens_after(max(0, position.step - 1))
    ends = position.step in (0, trainer.budget.steps)
    if not (ends or crossed(trainer.settings.validate_every, before, position.tokens)):
        return
    if metrics.has_validation(position.step):
        return
    with trainer.precision.working_copy(trainer.student):
        score = token_perplexity(trainer.student, trainer.validation, batch_size=min(8, trainer.micro_batch))
    monitor.validation({"step": position.step, "tokens": position.tokens, "validation_perplexity": score["perplexity"]})


def _final_weights(trainer: Trainer, student_dir: Path) -> dict[str, torch.Tensor]:
    """The state dict to export. What was not trained comes from the files: in memory it is in the compute dtype."""
    stored = Checkpoint.open(student_dir)
    state = trainer.student.state_dict(keep_vars=True)
    frozen = {name for name, tensor in state.items() if not tensor.requires_grad and name in stored.tensors}
    return {name: stored.read(name) if name in frozen else tensor for name, tensor in state.items()}


def _result(trainer: Trainer, position: Position, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
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
        "device": trainer.device,
        "precision": trainer.precision.name,
        "data_digest": trainer.data.digest,
        "data": trainer.data.info,
    }
