"""Asking a training to stop: once, as an echo, and again."""

import signal
import time

import pytest

from cla_convert.errors import Stopped
from cla_convert.training import stop
from cla_convert.training.stop import StopRequest


def stop_now(number: int, frame: object) -> None:
    raise Stopped


def test_a_signal_that_is_sent_twice_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` sends its own to the process and to its group; later a second one stops at once."""
    before = signal.signal(signal.SIGTERM, stop_now)
    try:
        with StopRequest() as request:
            assert not request.requested
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert request.requested
            monkeypatch.setattr(stop, "ECHO", 0.01)
            time.sleep(0.02)
            with pytest.raises(Stopped):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is stop_now
    finally:
        signal.signal(signal.SIGTERM, before)
