"""What reaches the terminal: errors in red there and plain elsewhere, messages on lines of their own."""

import io
import re
import sys
from contextlib import suppress

import pytest

from cla_convert import bars, console
from cla_convert.errors import InputError
from tests.conftest import wait_for


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that can do all, whichever the tests run in."""
    monkeypatch.setenv("TERM", "xterm")


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


def test_a_dumb_terminal_gets_lines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "dumb")
    with console.progress(10, "working") as bar, console.waiting("importing"):
        bar.update(3)
    console.fail(InputError("It broke"))
    assert type(bar) is bars.Bar and "\r" not in said() and "\033" not in said()


def said() -> str:
    return sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_a_message_makes_the_bar_move_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.progress(10, "working") as bar:
        bar.update(3)
        console.warn("mind the gap")
    assert "working" in said() and "\rwarning: mind the gap\n" in said()


def test_a_bar_ends_whole_unless_the_work_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    for failed in (False, True):
        monkeypatch.setattr(sys, "stderr", Terminal())
        with suppress(KeyError), console.progress(7, "working") as bar:
            bar.update(3)
            if failed:
                raise KeyError
        assert ("100%" in said()) != failed


def test_steps_move_the_innermost_bar_that_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(bars.time, "monotonic", lambda: 100.0)  # however long ago something was said
    monkeypatch.setattr(bars, "_last_line", 100.0)
    with console.progress(9, "outer", counts="rows") as outer, console.progress(9, "inner", counts="steps") as inner:
        bars.tick("rows", 2)
        bars.tick("steps", 3)
        bars.tick("others")
        assert (outer.n, inner.n) == (2, 3)
        with console.progress(9, "innermost", counts="rows") as innermost:
            bars.tick("rows", 20)
            assert (outer.n, innermost.n) == (2, 9), "never more than there is"
    bars.tick("rows")  # nobody counts them any more
    assert said() == "", "short work is no news in a log file"


def test_a_log_file_gets_lines_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(bars, "_last_line", 100.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with console.progress(60, "matching", unit="step", counts="matching"):
        for number in range(60):
            now[0] += 1
            bars.tick("matching", note=f"layer {number}")
    assert said().splitlines() == [
        "matching: 17%, 10 of 60 steps, 0:50 left, layer 9",
        "matching: 33%, 20 of 60 steps, 0:40 left, layer 19",
        "matching: 50%, 30 of 60 steps, 0:30 left, layer 29",
        "matching: 67%, 40 of 60 steps, 0:20 left, layer 39",
        "matching: 83%, 50 of 60 steps, 0:10 left, layer 49",
        "matching: 100%, 60 of 60 steps in 1:00",
    ]


def test_quiet_shows_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(console, "_quiet", True)
    with console.progress(3, "working") as bar:
        bar.update()
    assert said() == ""


def test_a_terminal_gets_lines_broken_between_words_and_commands_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"cla-convert run {'x' * 90} --out y"
    text = f"sharing     {'word ' * 20}\n  why: {'reason ' * 20}\nTo resume: {command}"
    monkeypatch.setattr(sys, "stderr", Terminal())
    console.say(text)
    first, second, why, more, resume, whole = [line.rstrip() for line in said().splitlines()]
    assert max(map(len, (first, second, why, more))) <= 80
    assert resume == "To resume:" and whole.strip() == command
    assert second.startswith(f"{' ' * 12}word") and more.startswith(f"{' ' * 7}reason")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    console.say(text)
    assert said() == f"{text}\n", "a log file gets it as it is"


@pytest.mark.parametrize("width", [80, 60, 30])
def test_what_belongs_together_is_not_broken(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(console, "columns", lambda _: width)
    quoted, row = "`cla-convert run mine.yaml --out x`", f"| {'cell ' * 30}|"
    console.page(f"  fix: Give what {quoted} wrote, which cla-convert did not make. {'More. ' * 12}\n{row}")
    console.page(f"- {'note ' * 30}")
    console.page(f"{'work ' * ((width - 2) // 5)}...")
    lines = sys.stdout.getvalue().splitlines()  # type: ignore[attr-defined]
    assert row in lines and any(quoted in line for line in lines)
    assert all(len(line) <= max(width, 8 + len(quoted)) for line in lines if line != row)
    assert lines[lines.index(row) + 2].startswith("  note") and "..." not in lines


def test_every_verb_is_known_as_one() -> None:
    from typer.main import get_command

    from cla_convert.cli import app

    assert {*console.VERBS.split("|")} == get_command(app).commands.keys()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (64_032, "64k"), (999_999, "1M"), (135e6, "135M"), (8.03e9, "8.03B"), (0, "0")]
)
def test_counts_have_the_unit_that_fits(number: float, text: str) -> None:
    assert console.human_count(number) == text


def test_a_bar_beats_while_a_step_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(bars, "_BEAT", 0.05)
    monkeypatch.setattr(bars._Heart, "_one", None)
    with console.progress(2, "reading", unit="row"):
        wait_for(lambda: len(set(re.findall(r"reading ([-\\|/]):", terminal.getvalue()))) > 1)
    shown = terminal.getvalue()
    assert len(set(re.findall(r"reading ([-\\|/]):", shown))) > 1
    assert re.split(r"[\r\n]+", shown.strip())[-1].startswith("reading: 100%")
    with console.waiting("importing") as bar:
        bar.note("torch")
        wait_for(lambda: re.search(r"importing [-\\|/] 00:\d\d, torch", terminal.getvalue()))


def test_a_bar_that_has_ended_beats_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that lets it beat may have picked it just before."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(bars, "_BEAT", -1.0)
    monkeypatch.setattr(bars._Heart, "begin", lambda: None)
    with console.progress(2, "reading", unit="row") as bar:
        bar.beat()  # type: ignore[attr-defined]
    shown = terminal.getvalue()
    assert "reading -:" in shown
    bar.beat()  # type: ignore[attr-defined]
    assert terminal.getvalue() == shown
