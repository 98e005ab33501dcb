"""Another process of a training is gone: killed, out of memory, or its machine or network lost."""

import torch.distributed as dist

from ..errors import TrainingError
from .divergence import last_good
from .state import TrainingStates


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
