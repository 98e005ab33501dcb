"""Stopping politely: the first signal (`stop_signals`) asks the loop to finish its step, a second one stops at once.

Under torchrun a second one does nothing: torchrun passes on what a scheduler sends to every process itself, and it
kills those that take too long. If torchrun itself is killed, what it started stops as politely.
"""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from ..console import say
from ..environment import ECHO, stop_signals, world_size
from .torchrun import orphaned


class StopRequest:
    """Context manager; `requested` is true once the user, or a scheduler, has asked to stop."""

    def __init__(self) -> None:
        self._asked: float | None = None
        """When, in seconds of the monotonic clock."""
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop."""
        return self._asked is not None or orphaned()

    def __enter__(self) -> "StopRequest":
        # Python delivers signals to the main thread only; elsewhere the host program decides.
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now, alone = time.monotonic(), world_size() == 1
        if self._asked is not None:
            if alone and now - self._asked > ECHO:
                self._restore()
                signal.raise_signal(number)  # with its usual effect
            return
        self._asked = now
        again = " (again: stop at once)" if alone else ""
        say(f"\n{signal.Signals(number).name}: finishing this step and saving a checkpoint{again}.")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
