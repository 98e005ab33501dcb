"""Watching a run: a bar on a terminal, else a line now and then; metrics.jsonl and the trackers get every row."""

import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from ..amounts import clock, human_bytes, human_count
from ..console import progress, say
from .metrics import Metrics
from .schedule import Budget
from .trackers import Tracker

_LINE_EVERY = 10.0
"""Seconds between lines in a log file."""
_RECENT = 20
"""Steps that the displayed speed is averaged over."""


class Monitor:
    """Shows and records the rows of a run."""

    def __init__(self, budget: Budget, tokens: int, metrics: Metrics, trackers: Sequence[Tracker]) -> None:
        """Start at `tokens` of the budget."""
        self._budget, self._metrics, self._trackers = budget, metrics, trackers
        self._perplexity: float | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)
        self._tokens, self._said = tokens, -_LINE_EVERY
        self._bar = progress(budget.tokens, "uptraining", unit="tok", counts="tokens", initial=tokens)
        self._lines = not sys.stderr.isatty()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()
        self._metrics.close()

    def step(self, row: dict[str, Any]) -> None:
        """A training step's row."""
        self._record(row)
        done, self._tokens = row["tokens"] - self._tokens, row["tokens"]
        self._recent.append((done, done / row["tokens_per_second"]))
        text = describe(row, self._perplexity)
        perplexity = "" if self._perplexity is None else f", ppl {self._perplexity:.4g}"
        self._bar.note(f"loss {row['loss']:.4g}{perplexity}")
        self._bar.move(row["tokens"])
        if self._lines and (row["step"] == self._budget.steps or time.monotonic() - self._said >= _LINE_EVERY):
            self._said = time.monotonic()
            say(f"step {row['step']}/{self._budget.steps}, {self._progress()}, {text}")

    def validation(self, row: dict[str, Any]) -> None:
        """A validation's row."""
        self._perplexity = row["validation_perplexity"]
        self._record(row)

    def _record(self, row: dict[str, Any]) -> None:
        self._metrics.write(row)
        for tracker in self._trackers:
            tracker.log(row)

    def _progress(self) -> str:
        """Tokens of the budget, speed, and the time that is left at that speed."""
        tokens, seconds = (sum(column) for column in zip(*self._recent, strict=True))
        left = (self._budget.tokens - self._tokens) * seconds / tokens
        return (
            f"{human_count(self._tokens)} of {human_count(self._budget.tokens)} tokens, "
            f"{human_count(tokens / seconds)}/s, {clock(left)} left"
        )


def describe(row: dict[str, Any], perplexity: float | None) -> str:
    """The numbers of a row that a person watches."""
    parts = [f"loss {row['loss']:.4f}"]
    parts += [f"{label} {row[name]:.4f}" for name, label in _TERMS.items() if name in row]
    if perplexity is not None:
        parts.append(f"validation ppl {perplexity:.4g}")
    parts += [f"|g| {row['grad_norm']:.2g}", f"lr {row['lr']:.1e}"]
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.0%}")
    parts.append(human_bytes(row["peak_memory_bytes"]))
    return ", ".join(parts)


_TERMS = {"kl": "KL", "cross_entropy": "CE", "hidden": "hidden"}
