"""What shows that work goes on: a bar on a terminal, a line now and then in a log file.

Work tells of its steps with `tick`, wherever it is done; the innermost open bar that counts such steps moves. So a bar
belongs to whoever knows how much there is to do, and a loop far below need not be handed it.
"""

import sys
import threading
import time
from contextlib import AbstractContextManager, suppress
from itertools import cycle
from types import TracebackType
from typing import Any, Self

from .amounts import clock, human_count

LINE_EVERY = 10.0
"""Seconds after which a log file gets a line of the work under way, if nothing else was written to it."""
_last_line = time.monotonic()

_open: "list[Bar]" = []


class Bar:
    """Work under way, shown in lines; `TerminalBar` shows it as a bar. Shown as whole once it ends without an error."""

    def __init__(self, total: float, desc: str, *, unit: str, counts: str = "", initial: float = 0) -> None:
        """Begin at `initial` of `total`; `counts` is the kind of `tick` that moves it."""
        self.total, self.n, self.counts = total, initial, counts
        self._desc, self._unit, self._note = desc, unit, ""
        self._first, self._began, self._told = initial, time.monotonic(), False
        _open.append(self)
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        if kind is None:
            self.move(self.total)
        self.close()

    def update(self, n: float = 1) -> None:
        """So much more is done."""
        self.move(self.n + n)

    def move(self, to: float) -> None:
        """So much is done in all; never more than there is."""
        self.n = min(max(self.n, to), self.total)
        self._show()

    def note(self, text: str) -> None:
        """A few words about where it is."""
        self._note = text

    def close(self) -> None:
        """Nothing more will be done."""
        if self in _open:
            _open.remove(self)
            self._end()

    def _begin(self) -> None:
        self._show()  # where all has been silent for long, what begins is told

    def _show(self) -> None:
        now = time.monotonic()
        if now - _last_line < LINE_EVERY or self.n >= self.total:
            return
        done, self._told = self.n - self._first, True
        left = f", {clock((self.total - self.n) * (now - self._began) / done)} left" if done else ""
        _line(f"{self._desc}: {self._amount()}{left}{f', {self._note}' if self._note else ''}")

    def _end(self) -> None:
        if self._told:  # who was told of the work is told of its end
            _line(f"{self._desc}: {self._amount()} in {clock(time.monotonic() - self._began)}")

    def _amount(self) -> str:
        share = self.n / self.total if self.total else 1
        return f"{share:.0%}, {human_count(self.n)} of {human_count(self.total)} {_PLURALS.get(self._unit, self._unit)}"


_PLURALS = {"tok": "tokens", "step": "steps", "row": "rows", "task": "tasks", "tensor": "tensors", "turn": "turns"}


class Hidden(Bar):
    """Shows nothing."""

    def _begin(self) -> None:
        pass

    def _show(self) -> None:
        pass

    def _end(self) -> None:
        pass


class TerminalBar(Bar):
    """A line of the terminal that changes, as wide as that is; a sign behind its name turns while a step takes long."""

    def __init__(self, total: float, desc: str, *, leave: bool = True, shape: str = "", **options: Any) -> None:
        """As `Bar`; without `leave` it is gone once the work is done. `shape` is a bar_format of tqdm's."""
        from tqdm import tqdm

        super().__init__(total, desc, **options)
        self._signs = cycle("-\\|/")
        self._bar = tqdm(
            total=total, initial=self.n, desc=desc, unit=self._unit, leave=leave, file=sys.stderr, dynamic_ncols=True,
            mininterval=0.2, maxinterval=1.0, unit_scale=total >= 10_000, bar_format=shape or _FORMAT,
        )  # fmt: skip
        self._shown, self._beats, self._ended = time.monotonic(), threading.RLock(), False
        _Heart.begin()

    def beat(self) -> None:
        """Show that work goes on, where it has not shown so itself for a second. Nothing once it has ended."""
        with self._beats:
            if not self._ended and time.monotonic() - self._shown > _BEAT:
                self._bar.desc = f"{self._desc} {next(self._signs)}"
                self._bar.refresh()

    def _begin(self) -> None:
        pass

    def note(self, text: str) -> None:
        """A few words about where it is."""
        self._bar.set_postfix_str(text, refresh=False)

    def _show(self) -> None:
        self._shown, self._bar.desc = time.monotonic(), self._desc
        if self.n > self._bar.n:
            self._bar.update(self.n - self._bar.n)
        else:
            self._bar.refresh()  # the clock goes on, and the note may be another

    def _end(self) -> None:
        with self._beats:
            self._ended, self._bar.desc = True, self._desc
            self._bar.close()


_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left, {rate_fmt}{postfix}"
_BEAT = 1.0


class _Heart(threading.Thread):
    """Lets the innermost bar of a terminal beat, once a second, whatever the work is at."""

    _one: "_Heart | None" = None

    @classmethod
    def begin(cls) -> None:
        """There is one, for as long as the process lives."""
        if cls._one is None or not cls._one.is_alive():  # a process that was forked has none
            cls._one = cls(daemon=True)
            cls._one.start()

    def run(self) -> None:
        while True:
            time.sleep(_BEAT)
            if shown := [bar for bar in tuple(_open) if isinstance(bar, TerminalBar)]:
                shown[-1].beat()


def tick(counts: str, n: float = 1, note: str | None = None) -> None:
    """Tell of `n` steps of a kind, and perhaps where the work is. Where nobody counts them, nothing happens."""
    for bar in reversed(_open):
        if bar.counts == counts:
            if note is not None:
                bar.note(note)
            bar.update(n)
            return


def write(text: str) -> None:
    """Print a message to stderr, on lines of its own; an open bar makes room and comes back below."""
    if any(isinstance(bar, TerminalBar) for bar in _open):
        from tqdm import tqdm

        with _lost_without_reader():
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()
    else:
        _line(text)


def _line(text: str) -> None:
    global _last_line
    _last_line = time.monotonic()
    with _lost_without_reader():
        print(text, file=sys.stderr, flush=True)


def _lost_without_reader() -> AbstractContextManager[None]:
    """No work ends, and no checkpoint is lost, because nobody is told: a terminal or `tee` has gone, a disk is full."""
    return suppress(OSError)
