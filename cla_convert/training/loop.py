"""Uptraining: recover a converted model's quality on a token budget.

    uptrain: set up -> resume -> for every step: gradients, update, checkpoint, validation -> export

The state of a run is its step: data order and learning rate are functions of it, everything else is in the
checkpoint. The same command line therefore resumes after Ctrl-C, SIGTERM or a crash, and on one CPU process ends with
the very same weights.
"""

import errno
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..console import human_count, progress, say
from ..environment import peak_memory_bytes
from ..errors import Interrupted, TrainingError
from ..evaluation.perplexity import token_perplexity
from ..models.export import check_exportable, export_model
from ..models.writer import check_output
from ..recipe import Recipe
from .metrics import Metrics, NoMetrics, read_rows
from .parallel import check_team, team, whole
from .schedule import crossed, learning_rate
from .state import Checkpoints, Position
from .stop import StopRequest
from .torchrun import call_the_others
from .trainer import Trainer, run_identity, set_up

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    allow_changes: Collection[str] = (),
) -> dict[str, Any]:
    """Train the model in `student_dir` on the recipe's token budget and publish it as `out_dir`.

    Args:
        student_dir: folder of the converted model (any causal language model works).
        teacher_dir: folder of the source model, for distillation.
        out_dir: folder of the result; appears whole or not at all.
        recipe: its `train` and `data` sections and the seed are used; `train.tokens` must not be 0.
        run_dir: holds checkpoints/ and metrics.jsonl.
        device: `cpu`, `cuda`, `cuda:1`, ...
        resume_command: shown to the user on interruption.
        fresh: start over instead of resuming.
        allow_changes: settings that may differ from those of the checkpoint; see `Checkpoints`.

    Under torchrun all processes take part; the first one calls the others, writes the files and has the result.

    Returns:
        tokens, steps, seconds, tokens_per_second, loss, first_loss, validation, peak_memory_bytes and what was used.

    Raises:
        UsageError: several processes cannot share the device.
        InputError: data, models or `out_dir` are not usable, before any training.
        TrainingError: the loss is not finite, the disk is full, or the checkpoints are of another run.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    arguments = dict(locals())
    check_output(out_dir, overwrite=True)  # before hours of work, not after
    check_team(device)
    call_the_others(arguments)
    with team(device) as crew:
        trainer = set_up(student_dir, teacher_dir, recipe, crew.device, crew)
        check_exportable(trainer.student.state_dict(), student_dir)
        identity = run_identity(student_dir, teacher_dir, recipe, trainer)
        checkpoints = Checkpoints(
            run_dir / "checkpoints", identity, recipe.train.keep_checkpoints, team=crew, allow_changes=allow_changes
        )
        if fresh:
            checkpoints.clear()
        position = _resume(trainer, checkpoints)
        log = run_dir / "metrics.jsonl"
        metrics = Metrics(log, position.step if position.step else None) if crew.leads else NoMetrics()
        try:
            with StopRequest() as stop:
                position = _train(trainer, position, checkpoints, metrics, stop, resume_command)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            raise checkpoints.disk_trouble(str(error)) from error
        finally:
            metrics.close()
        result = _result(trainer, position, read_rows(log)) | {"changes": checkpoints.changes}
        state = crew.whole_state(trainer.student)
    if crew.leads:
        export_model(state, student_dir, out_dir, manifest={"uptraining": result | identity}, overwrite=True)
    return result


def _resume(trainer: Trainer, checkpoints: Checkpoints) -> Position:
    path = checkpoints.latest()
    if path is None:
        return Position()
    position = checkpoints.load(path, trainer.student, trainer.optimizer)
    say(f"resuming from {path} at {human_count(position.tokens)} of {human_count(trainer.budget.tokens)} tokens")
    return position


def _train(
    trainer: Trainer,
    position: Position,
    checkpoints: Checkpoints,
    metrics: Metrics,
    stop: StopRequest,
    resume_command: str,
) -> Position:
    """Steps until the budget is spent; returns the final position."""
    settings, budget = trainer.settings, trainer.budget
    with progress(budget.tokens, "uptraining", unit="tok", initial=position.tokens) as bar:
        _validate_if_due(trainer, position, metrics)
        while position.step < budget.steps:
            before = position
            position, row = _step(trainer, position, checkpoints)
            metrics.write(row)
            bar.set_postfix(loss=f"{row['loss']:.4f}", lr=f"{row['lr']:.1e}", refresh=False)
            bar.update(position.tokens - before.tokens)
            last, stopping = position.step == budget.steps, trainer.team.any(stop.requested)
            if last or stopping or crossed(settings.checkpoint_every, before.tokens, position.tokens):
                metrics.sync()
                saved = checkpoints.save(position, trainer.student, trainer.optimizer)
                if stopping and not last:
                    raise Interrupted(
                        f"Interrupted at {human_count(position.tokens)} of {human_count(budget.tokens)} tokens",
                        f"Everything is saved in {saved}.",
                        f"Resume with: {resume_command}" if resume_command else "Run the same command to resume.",
                    )
            _validate_if_due(trainer, position, metrics)
    return position


def _step(trainer: Trainer, position: Position, checkpoints: Checkpoints) -> tuple[Position, dict[str, Any]]:
    """One optimiser step; returns the new position and its row for metrics.jsonl."""
    start, settings, budget = time.perf_counter(), trainer.settings, trainer.budget
    tokens = budget.tokens_after(position.step + 1)
    rate = learning_rate(
        position.tokens,
        tokens,
        budget.tokens,
        peak=settings.learning_rate,
        schedule=settings.schedule,
        warmup=settings.warmup,
        final=settings.final_lr,
    )
    # What is random in a step (dropout) depends on its number too: no generator has to be saved.
    torch.manual_seed(_step_seed(trainer, position.step))
    losses = _gradients(trainer, *budget.step_range(position.step))
    norm = whole(torch.nn.utils.clip_grad_norm_(trainer.parameters.values(), settings.clip))
    loss = losses.sum().item()
    if not (torch.isfinite(losses).all() and torch.isfinite(norm)):
        raise _not_finite(trainer, position, losses, norm.item(), checkpoints)
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    first = loss if position.first_loss is None else position.first_loss
    row = {
        "step": position.step + 1,
        "tokens": tokens,
        "loss": loss,
        "lr": rate,
        "grad_norm": norm.item(),
        "tokens_per_second": (tokens - position.tokens) / seconds,
        "seconds": position.seconds + seconds,
    }
    return Position(position.step + 1, tokens, position.seconds + seconds, first, loss), row


def _gradients(trainer: Trainer, first: int, end: int) -> torch.Tensor:
    """Accumulate the gradients of sequences first .. end-1.

    Every micro-batch is divided by the targets of the whole step: the sum is the mean over tokens however it is cut.

    Returns:
        Each micro-batch's part of the loss, of all processes: [passes].
    """
    denominator = (end - first) * trainer.objective.targets(trainer.budget.length)
    losses = []
    for part in trainer.team.share(first, end, trainer.settings.micro_batch_size):
        rows = trainer.sequences.rows(max(1, len(part)), part.start if part else first)
        ids = torch.from_numpy(rows).to(trainer.device)
        with trainer.precision.autocast():
            loss = trainer.team.run(trainer.objective, trainer.student, ids, denominator) * bool(part)
        loss.backward()
        losses.append(loss.detach())
    return trainer.team.gather(torch.stack(losses))


def _step_seed(trainer: Trainer, step: int) -> int:
    return int(np.random.SeedSequence([trainer.seed, step, trainer.team.rank]).generate_state(1)[0])


def _validate_if_due(trainer: Trainer, position: Position, metrics: Metrics) -> None:
    """Validation perplexity at the start, at intervals and at the end; once a step, also after a resume."""
    before = trainer.budget.tokens_after(max(0, position.step - 1))
    ends = position.step in (0, trainer.budget.steps)
    if not (ends or crossed(trainer.settings.validate_every, before, position.tokens)):
        return
    if trainer.team.decide(metrics.has_validation(position.step)):
        return
    with trainer.precision.autocast():  # every process does it all: the sequences are few, and the result is one
        size = trainer.settings.micro_batch_size
        score = trainer.team.run(token_perplexity, trainer.student, trainer.validation, batch_size=size)
    metrics.write({"step": position.step, "tokens": position.tokens, "validation_perplexity": score["perplexity"]})


def _not_finite(
    trainer: Trainer, position: Position, losses: torch.Tensor, norm: float, checkpoints: Checkpoints
) -> TrainingError:
    first, end = trainer.budget.step_range(position.step)
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if bad:
        part = trainer.team.all_shares(first, end, trainer.settings.micro_batch_size)[bad[0]]
        first, end = part.start, part.stop
    saved = checkpoints.all()
    kept = f"The last good checkpoint is {saved[-1]}." if saved else "There is no checkpoint yet."
    what = "loss" if bad else "gradient"
    return TrainingError(
        f"The {what} is not finite at step {position.step + 1}, sequences {first} to {end - 1}",
        f"Loss {losses.sum().item()}, gradient norm {norm}. {kept}",
        "Lower train.learning_rate, raise train.warmup, or try train.precision=float32; then start over.",
    )


def _result(trainer: Trainer, position: Position, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tokens": position.tokens,
        "steps": position.step,
        "seconds": position.seconds,
        "tokens_per_second": position.tokens / position.seconds,
        "objective": trainer.settings.loss,
        "loss": position.loss,
        "first_loss": position.first_loss,
        "validation": [row for row in rows if "validation_perplexity" in row],
        "parameters_trained": sum(p.numel() for p in trainer.parameters.values()),
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "device": trainer.device,
        "processes": trainer.team.size,
        "precision": trainer.precision.name,
        "data_digest": trainer.data.digest,
        "data": trainer.data.info,
    }
