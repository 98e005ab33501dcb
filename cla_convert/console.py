"""Output conventions: data on stdout, everything else (progress, notes, warnings, errors) on stderr."""

import json
import os
import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any, TextIO

from . import bars
from .amounts import human_bytes as human_bytes
from .amounts import human_count as human_count
from .errors import ClaError


def mute() -> None:
    """Print nothing any more, whoever asks: one of several processes speaks for all."""
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  (as long as the process lives)


def unmute() -> None:
    """Undo `mute`: this process has something to say that no other one said."""
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def opened() -> None:
    """Let streams that were closed before the start (`>&-`) lead nowhere; Python has none in their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  (as long as the process lives)


_quiet = False


def hush(wanted: bool = True) -> None:
    """Say nothing but warnings and errors from now on, and show no progress (`-q`)."""
    global _quiet
    _quiet = wanted


def quiet() -> bool:
    """Whether it was hushed."""
    return _quiet


def say(message: str = "") -> None:
    """Print a note for the person watching (stderr)."""
    if not _quiet:
        _tell(message)


def warn(message: str) -> None:
    """Print a warning (stderr)."""
    _tell(f"warning: {message}")


TOLD: set[str] = set()
"""What is said once in a process, and was."""


def say_once(message: str) -> None:
    """`say`, however often it is true in this process."""
    if message not in TOLD:
        TOLD.add(message)
        say(message)


def warn_once(message: str, about: str = "") -> None:
    """`warn`, likewise; of all that is said `about` one thing, the first."""
    if (about or message) not in TOLD:
        TOLD.add(about or message)
        warn(message)


def _tell(message: str) -> None:
    bars.write(_fitted(message, sys.stderr))


def page(text: str) -> None:
    """Print a result that is to be read (stdout): on a terminal its lines are broken between words, too."""
    data(_fitted(text, sys.stdout))


def columns(stream: TextIO) -> int:
    """How wide a text there should be at most: 80 where there is no terminal."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _fitted(text: str, stream: TextIO) -> str:
    return "\n".join(_wrapped(line, columns(stream)) for line in text.split("\n")) if stream.isatty() else text


_LABEL = re.compile(r"\s*(?:- |[\w.-]+:\s|[\w.-]+(?: [\w.-]+)?\s{2,})?")
"""What the lines below a long one stand behind: blanks, `- `, `why: `, `sharing     `."""
VERBS = "inspect|convert|verify|chat|uptrain|run|eval|bench|report|env|recipes|cache"
_WHOLE = re.compile(rf"`[^`]*`|(?<![`\w])cla-convert (?:{VERBS}) [^`]*$| \.\.\.$")
"""What is not broken: what stands in backticks; a command, which a line ends with; the dots behind what goes on."""


def _wrapped(line: str, width: int) -> str:
    """A line for a terminal, broken between words; a command stays whole, to be copied, and so does a table's row."""
    if len(line) <= width or line.startswith("|"):
        return line
    found = _LABEL.match(line)
    indent = " " * min(found.end() if found else 0, 16)
    glued = _WHOLE.sub(lambda whole: whole[0].replace(" ", "\0"), line)
    lines = textwrap.fill(glued, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")


def command(*words: object) -> str:
    """A line of ours to be copied: names with blanks and the like are quoted."""
    return shlex.join(["cla-convert", *map(str, words)])


def data(text: str) -> None:
    """Print a result (stdout)."""
    # What a file says may hold lone surrogates, and a terminal may know less than Unicode.
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="backslashreplace").decode(encoding), flush=True)


def data_json(value: dict[str, Any]) -> None:
    """Print one JSON object (stdout), for `--json`."""
    data(json.dumps(value, indent=2, ensure_ascii=False))


def fail(error: ClaError) -> None:
    """Print a user's error as what / why / how to fix (stderr)."""
    red, plain = ("\033[1;31m", "\033[0m") if _moves() and "NO_COLOR" not in os.environ else ("", "")
    bars.write(_fitted(f"error: {error.what}", sys.stderr).replace("error:", f"{red}error:{plain}", 1))
    if error.why:
        _tell(f"  why: {error.why}")
    if error.fix:
        _tell(f"  fix: {error.fix}")


def _moves() -> bool:
    """Whether there is a terminal that can do more than print lines."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def debug() -> bool:
    """Whether CLA_DEBUG asks for tracebacks."""
    return os.environ.get("CLA_DEBUG", "") not in ("", "0")


def progress(
    total: float, desc: str, unit: str = "it", *, counts: str = "", initial: float = 0, leave: bool = True,
    hidden: bool = False,
) -> bars.Bar:  # fmt: skip
    """How far work is: a bar on a terminal, a line every ten seconds elsewhere, nothing with `-q`.

    Args:
        total: of what there is to do.
        desc: what is done.
        unit: of what is counted.
        counts: kind of `bars.tick` that moves it.
        initial: what is done already.
        leave: whether a terminal keeps the line once the work is done.
        hidden: show nothing.
    """
    if hidden or _quiet:
        return bars.Hidden(total, desc, unit=unit, counts=counts, initial=initial)
    if _moves():
        return bars.TerminalBar(total, desc, unit=unit, counts=counts, initial=initial, leave=leave)
    return bars.Bar(total, desc, unit=unit, counts=counts, initial=initial)


def waiting(desc: str) -> bars.Bar:
    """Work of which nobody knows how far it is: on a terminal a line with a clock, gone once it is done."""
    if _quiet or not _moves():
        return bars.Hidden(1, desc, unit="it")
    return bars.TerminalBar(1, desc, unit="it", leave=False, shape="{desc} {elapsed}{postfix}")
