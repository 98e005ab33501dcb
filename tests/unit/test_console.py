"""What reaches the terminal: errors in red there and plain elsewhere, messages on lines of their own."""

import io
import sys

import pytest

from cla_convert import console
from cla_convert.errors import InputError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "no_color", "red"), [(Terminal, False, True), (Terminal, True, False),
                                                         (io.StringIO, False, False)])  # fmt: skip
def test_errors_are_red_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], no_color: bool, red: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    console.fail(InputError("It broke", why="Because.", fix="Mend it."))
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("\033[1;31merror:\033[0m It broke" in said) == red
    assert said.endswith("error: It broke\n  why: Because.\n  fix: Mend it.\n") != red


def test_a_message_makes_the_bar_move_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with console.progress(10, "working") as bar:
        bar.update(3)
        bar.refresh()
        console.warn("mind the gap")
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "working" in said and "\rwarning: mind the gap\n" in said
