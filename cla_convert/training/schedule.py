"""Steps and learning rates of a run: pure functions of the token budget, so that resuming needs no scheduler state."""

import math
from dataclasses import dataclass
from typing import Literal

from ..console import warn
from ..recipe import Train

DECAY = 0.2
"""Share of the budget over which `wsd` decays (1-sqrt, Hägele et al. 2024, arXiv 2405.18392)."""

_FEW, _GOOD = 20, 100
"""Optimiser steps."""


@dataclass(frozen=True)
class Budget:
    """A token budget in whole sequences: every step has `batch` of them, the last one what is left."""

    sequences: int
    batch: int
    length: int

    @classmethod
    def of(cls, train: Train) -> "Budget":
        """Whole sequences that fit the budget; a batch is at least one and at most all of them. Never exceeds it."""
        sequences = train.tokens // train.sequence_length
        batch = max(1, min(train.batch_tokens // train.sequence_length, sequences))
        return cls(sequences, batch, train.sequence_length)

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return math.ceil(self.sequences / self.batch)

    @property
    def tokens(self) -> int:
        """Tokens that will be seen."""
        return self.sequences * self.length

    def step_range(self, step: int) -> tuple[int, int]:
        """First and one-past-last sequence index of step 0, 1, ..."""
        return step * self.batch, min((step + 1) * self.batch, self.sequences)

    def tokens_after(self, step: int) -> int:
        """Tokens seen once so many steps are done."""
        return min(step * self.batch, self.sequences) * self.length


def learning_rate(
    before: int,
    after: int,
    total: int,
    *,
    peak: float,
    schedule: Literal["cosine", "wsd", "constant"],
    warmup: float,
    final: float,
) -> float:
    """Learning rate of the step that takes the tokens seen from `before` to `after`, of `total`.

    It is read off in the middle of the step: at its start the first step would have rate 0, at its end the last one.

    Args:
        before: tokens seen before the step.
        after: tokens seen after it.
        total: tokens of the whole run.
        peak: the rate after warm-up.
        schedule: `cosine` ends at `final`; `wsd` is constant, then falls to 0 over the last fifth; `constant`.
        warmup: share of the budget over which the rate rises linearly.
        final: share of the peak at which `cosine` ends.
    """
    done = (before + after) / 2 / total
    if done < warmup:
        return peak * done / warmup
    if schedule == "cosine":
        fraction = (done - warmup) / (1 - warmup)
        return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * fraction)))
    if schedule == "wsd" and done > 1 - DECAY:
        return peak * (1 - math.sqrt((done - (1 - DECAY)) / DECAY))
    return peak


def crossed(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` tokens lies in (before, after]; never for 0."""
    return every > 0 and after // every > before // every


def check_steps(train: Train) -> None:
    """Warn of a run of so few optimiser steps that the learning rate hardly rises before it falls."""
    budget = Budget.of(train)
    smaller = max(1, budget.sequences // _GOOD) * budget.length
    if budget.sequences > 0 and budget.steps < _FEW and smaller < budget.batch * budget.length:
        warn(f"{budget.steps} optimiser steps are few: train.batch_tokens={smaller} makes more of the same text")
