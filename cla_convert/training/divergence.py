"""What stops a run that went wrong: a loss that is not finite or jumps and stays, no memory, a process that is gone."""

from collections.abc import Iterable, Sequence
from statistics import median

import torch
import torch.distributed as dist

from ..errors import TrainingError
from .micro_batch import advice
from .schedule import Budget
from .state import Position, TrainingStates
from .trainer import Trainer

PATIENCE = 10
"""Steps in a row above the limit that make a spike."""
_WINDOW, _FEWEST = 100, 20
"""Losses that the median is taken over: the last so many before the spike; with fewer of them nothing is judged."""
HISTORY = PATIENCE + _WINDOW
"""Losses that are looked at."""


def steps_above(losses: Sequence[float], factor: float) -> int:
    """How many of the last losses, at most PATIENCE, lie above `factor` times the median of those just before them.

    A single bad batch is above for a step; training that diverges stays above. A function of the history alone, so
    that a resumed run judges as an uninterrupted one. 0 if `factor` is 0.
    """
    for high in range(min(PATIENCE, len(losses)), 0, -1):
        before = losses[-high - _WINDOW : -high]
        if factor and len(before) >= _FEWEST and min(losses[-high:]) > factor * median(before):
            return high
    return 0


def spiked(position: Position, budget: Budget, losses: Sequence[float], checkpoints: TrainingStates) -> TrainingError:
    """The error for a spike that ends at `position`."""
    first, _ = budget.step_range(position.step - PATIENCE)
    _, end = budget.step_range(position.step - 1)
    usual = median(losses[-PATIENCE - _WINDOW : -PATIENCE])
    return TrainingError(
        f"The loss jumped at step {position.step - PATIENCE + 1} and stayed there, sequences {first} to {end - 1}",
        f"It was {usual:.4g} and has been {min(losses[-PATIENCE:]):.4g} or more for {PATIENCE} steps. "
        + last_good(checkpoints),
        "Lower train.learning_rate or raise train.warmup, then start over; or set train.spike=0 and resume.",
    )


def not_finite(
    trainer: Trainer, position: Position, losses: torch.Tensor, norm: float, checkpoints: TrainingStates
) -> TrainingError:
    """The error for the step after `position`.

    `losses` [passes] are the shares of its passes, of all processes, `norm` is that of its gradient.
    """
    first, end = trainer.budget.step_range(position.step)
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if bad:
        part = trainer.team.all_shares(first, end, trainer.micro_batch)[bad[0]]
        first, end = part.start, part.stop
    what = "loss" if bad else "gradient"
    return TrainingError(
        f"The {what} is not finite at step {position.step + 1}, sequences {first} to {end - 1}",
        f"Loss {losses.sum().item()}, gradient norm {norm}. {last_good(checkpoints, position.step)}",
        "Lower train.learning_rate, raise train.warmup, or try train.precision=float32; then start over.",
    )


def ruined(position: Position, what: str, checkpoints: TrainingStates) -> TrainingError:
    """The error for weights that the step before `position` left without a use."""
    return TrainingError(
        f"{what} after step {position.step}: the model is not published",
        last_good(checkpoints, position.step),
        "Lower train.learning_rate or raise train.warmup, then start over.",
    )


def out_of_memory(trainer: Trainer, checkpoints: TrainingStates, error: RuntimeError) -> TrainingError:
    """The error for a step that memory did not suffice for."""
    rows = trainer.micro_batch
    return TrainingError(
        f"Memory ran out with {rows} sequences a pass",
        f"{str(error).strip().splitlines()[0].rstrip('.')}. {last_good(checkpoints)}",
        f"{advice(trainer.forecast, rows)} Is something else on the device? train.micro_batch_size and "
        "train.activation_checkpointing may change when the run is resumed (--allow-change).",
    )


def is_lost(error: RuntimeError) -> bool:
    """Whether it says that another process does not answer; gloo has no error of its own for it."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def lost(error: RuntimeError, checkpoints: TrainingStates, resume_command: str) -> TrainingError:
    """The error for a step that another process did not finish. What it held is lost with it."""
    again = f"Run again: {resume_command}. " if resume_command else "Run the same command again. "
    return TrainingError(
        "Another process of the training is gone",
        f"{str(error).strip().splitlines()[0].rstrip('.')}. {last_good(checkpoints)}",
        f"{again}It goes on from the last checkpoint; under torchrun, --max-restarts does so by itself.",
    )


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no weight is inf or nan."""
    own = [getattr(tensor, "_local_tensor", tensor).detach() for tensor in tensors]  # of a sharded one, this process's
    return not own or bool(torch.stack([tensor.sum() for tensor in own]).isfinite().all())


def last_good(checkpoints: TrainingStates, step: int | None = None) -> str:
    """Names the newest checkpoint; that of `step` itself, at which something failed, has not proved to be good."""
    whole = checkpoints.all()
    unproved = [path for path in whole if step is not None and path == checkpoints.at(step)]
    good = [path for path in whole if path not in unproved]
    said = f"The last good checkpoint is {good[-1]}." if good else "There is no good checkpoint yet."
    return f"{said} {unproved[0]} may hold what failed: remove it if resuming fails again." if unproved else said
