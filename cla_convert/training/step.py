"""One optimiser step: gradients over micro-batches, update, and its row for metrics.jsonl."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from ..bars import tick
from ..environment import peak_memory_bytes
from .divergence import not_finite
from .optimizer import peak_rate
from .schedule import learning_rate
from .sharded import whole
from .state import Position, TrainingStates
from .trainer import Trainer


def take_step(trainer: Trainer, position: Position, checkpoints: TrainingStates) -> tuple[Position, dict[str, Any]]:
    """One optimiser step; returns the new position and its row for metrics.jsonl."""
    start, settings, budget = time.perf_counter(), trainer.settings, trainer.budget
    tokens = budget.tokens_after(position.step + 1)
    rate = _rate(trainer, position.tokens, tokens)
    # What is random in a step (dropout) depends on its number too: no generator has to be saved.
    torch.manual_seed(_step_seed(trainer, position.step))
    with trainer.computing():
        shares = gradients(trainer, *budget.step_range(position.step))
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
    now = Position(position.step + 1, tokens, position.seconds + seconds, first, loss)
    return now, _row(trainer, now, parts, norm, rate(peak=peak_rate("shared", settings)), speed)


def _rate(trainer: Trainer, before: int, after: int) -> Callable[..., float]:
    """The learning rate of a step, of a `peak`."""
    settings = trainer.settings
    return partial(
        learning_rate,
        before,
        after,
        trainer.budget.tokens,
        schedule=settings.schedule,
        warmup=settings.warmup,
        final=settings.final_lr,
    )


def _row(
    trainer: Trainer, position: Position, parts: list[float], norm: float, rate: float, speed: float
) -> dict[str, Any]:
    """What metrics.jsonl says of the step that ended at `position`."""
    return {
        "step": position.step,
        "tokens": position.tokens,
        "loss": position.loss,
        **(dict(zip(trainer.objective.parts, parts, strict=True)) if len(parts) > 1 else {}),
        "lr": rate,
        "grad_norm": norm,
        "tokens_per_second": speed,
        **({"mfu": mfu} if (mfu := trainer.utilisation(speed)) else {}),
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "seconds": position.seconds,
    }


def gradients(trainer: Trainer, first: int, end: int) -> torch.Tensor:
    """Accumulate the gradients of sequences first .. end-1.

    Every micro-batch is divided by the targets of the whole step: the sum is the mean over tokens however it is cut.

    Returns:
        Each pass's share of the loss and of its parts, of all processes: [passes, 1 + parts].
    """
    denominator = (end - first) * (trainer.budget.length - 1)  # every token but the first
    denominator -= trainer.sequences.boundaries(end - first, first)
    shares, done = [], first / trainer.budget.sequences
    parts = trainer.team.share(first, end, trainer.micro_batch)
    for number, part in enumerate(parts, 1):
        trainer.team.begin_pass(trainer.student, last=number == len(parts), once=trainer.forecast.layout.gathers_once)
        some = part or range(first, first + 1)
        ids, positions = _batch(trainer, some)
        loss, record = trainer.team.run(
            trainer.objective, trainer.student, ids, positions, denominator, done, len(some)
        )
        (loss * bool(part)).backward()
        tick("tokens", len(part) * trainer.budget.length * trainer.team.size)
        shares.append(record * bool(part))
    return trainer.team.gather(torch.stack(shares))


def _step_seed(trainer: Trainer, step: int) -> int:
    return int(np.random.SeedSequence([trainer.seed, step, trainer.team.rank]).generate_state(1)[0])


def _batch(trainer: Trainer, part: range) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sequences `part` on the device, [B, T], and their positions where documents are kept apart.

    B is what the layers are compiled for: a last pass of fewer sequences would run otherwise, and take more memory (a
    third more for Gemma 3 270M). The last sequence fills it.
    """
    missing = max(0, trainer.micro_batch - len(part)) if trainer.compiled else 0
    arrays = (source(len(part), part.start) for source in (trainer.sequences.rows, trainer.sequences.positions))
    ids, positions = (
        None if array is None else _to_device(trainer, torch.from_numpy(np.pad(array, ((0, missing), (0, 0)), "edge")))
        for array in arrays
    )
    assert ids is not None
    return ids, positions


def _to_device(trainer: Trainer, tensor: torch.Tensor) -> torch.Tensor:
    """A copy for which the host does not wait."""
    return (tensor.pin_memory() if trainer.precision.device_type == "cuda" else tensor).to(
        trainer.device, non_blocking=True
    )
