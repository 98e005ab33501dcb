"""What `auto` comes to once the models are known."""

from math import sqrt
from typing import Any

from ..recipe import Train
from .schedule import Budget

WIDTH, RATE, REST = 576, 1e-3, 0.2
"""Where rates were measured (hidden size of SmolLM2-135M), attention's there, and the share of it for all else."""
SETTLED = 100
"""Optimiser steps from which on the rate does not depend on their number."""
HIDDEN_WEIGHT = 30.0


def derived(train: Train, student: Any, teacher: Any) -> Train:
    """`train` with numbers for `learning_rate` and `hidden_weight`; evidence for both is in docs/uptraining.md.

    Args:
        train: the recipe's section.
        student: config of the model to train.
        teacher: config of the teacher; None without one.
    """
    same = teacher is not None and all(
        getattr(student, name) == getattr(teacher, name) for name in ("num_hidden_layers", "hidden_size")
    )
    update: dict[str, Any] = {}
    if train.hidden_weight == "auto":
        update["hidden_weight"] = HIDDEN_WEIGHT if same and train.needs_teacher else 0.0
    if train.learning_rate == "auto":
        update |= _rates(train, student.hidden_size)
    return train.model_copy(update=update)


def _rates(train: Train, width: int) -> dict[str, Any]:
    """What conversion has changed, attention, moves five times faster than what it has not, where the loss asks for
    nothing new (RADLADS, arXiv 2505.03005, likewise). Other widths by muP's rule for Adam: 1/width (arXiv 2203.03466,
    table 3). Few steps get less, by the square root: Adam's first ones are mostly noise, and too few follow to mend it.
    """
    few = sqrt(min(1.0, (Budget.of(train).steps or SETTLED) / SETTLED))
    rate = _two_digits(RATE * min(1.0, WIDTH / width) * few)
    if not train.needs_teacher:
        return {"learning_rate": rate}
    return {
        "learning_rate": _two_digits(REST * rate),
        "learning_rates": {"attention": rate} | train.learning_rates,
    }


def _two_digits(rate: float) -> float:
    return float(f"{rate:.2g}")
