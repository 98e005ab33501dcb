"""The words of a command line as values, and what is wrong with them in words of our own."""

import re
from collections.abc import Callable, Collection
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

import typer

from ..errors import UsageError
from .verbs import WHOLE

CLICK_ERROR = cast(type[Exception], typer.BadParameter.__mro__[2])
"""click's ClickException, of the click that this typer uses: releases differ in whether they bring their own."""


def check_words(words: list[str]) -> None:
    """Raise UsageError for an empty word, which would stand for this folder, or for the default; or for no UTF-8."""
    if empty := next((number for number, word in enumerate(words) if not word.strip()), None):
        raise UsageError(
            f"Nothing stands behind {words[empty - 1]}",
            why="An argument is empty, as of a variable of the shell that is not set.",
            fix="Give a value, or leave it out.",
        )
    for option, word in zip(["", *words], words, strict=False):
        of_model = "--system" in (option, word.partition("=")[0])  # said to the model with replacements
        if not _READABLE.fullmatch(word) and not of_model:
            raise UsageError(
                f"{word} cannot be read",
                why="It is no UTF-8, or Python is told not to read it as that (LC_ALL, PYTHONUTF8=0).",
                fix="Give it in UTF-8 (a file: rename it), or PYTHONUTF8=1.",
            )


_READABLE = re.compile("[^\ud800-\udfff]*")
"""Python keeps bytes that it cannot read as halves of characters."""


def whole(option: str, least: int, example: int) -> Callable[[Any], int]:
    """A parser of whole numbers from `least` on. It raises UsageError."""
    return partial(_at_least, int, "a whole number", option, least, example)


def number(option: str, least: float, example: float) -> Callable[[Any], float]:
    """A parser of numbers from `least` on. It raises UsageError."""
    return partial(_at_least, float, "a number", option, least, example)


def _at_least(read: Callable[[Any], Any], what: str, option: str, least: float, example: float, text: Any) -> Any:
    try:
        value = read(text)
    except ValueError:
        value = None
    if value is None or not least <= value < float("inf"):
        raise UsageError(
            f"{option}: {text!r} is not {what} of {least:g} or more", fix=f"For example {option} {example:g}"
        )
    return value


def size_of(text: str | None, option: str) -> int | None:
    """`8GB` -> 8_000_000_000. Raises UsageError."""
    from ..recipe import parse_size

    try:
        size = parse_size(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}", fix=f"For example {option} 8GB") from error
    if text and text.strip().isdecimal() and 0 < int(text) < _A_SIZE:
        raise UsageError(
            f"{option}: {text!r} is a number of bytes",
            why="A size without a unit is one of bytes, and that is too few.",
            fix=f"For example {option} {text.strip()}GB",
        )
    if size == 0:
        raise UsageError(f"{option}: {text!r} is nothing", fix=f"For example {option} 8GB")
    return size


_A_SIZE = 100_000
"""Bytes: below, a unit was forgotten."""


def numbers_of(text: str, option: str) -> list[int]:
    """`1,2,4` -> [1, 2, 4]. Raises UsageError for anything but positive whole numbers."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise UsageError(
            f"{option}: {text!r} is not a list of positive whole numbers", fix=f"For example {option} 1,2,4"
        )
    return [int(word) for word in words]


def names_of(text: str) -> list[str]:
    """`a, b,` -> [a, b]."""
    return [name for word in text.split(",") if (name := word.strip())]


def texts_in(paths: list[str], taken: Collection[str]) -> list[dict[str, str]]:
    """Text files as settings (`eval.perplexity`), each named as its file is, without the ending.

    A name that another text has, or `taken`, gets a number: `law-2`.
    """
    found: dict[str, str] = {}
    for path in paths:
        stem = _NOT_A_NAME.sub("-", Path(path).stem).strip("-._") or "text"
        names = chain([stem], (f"{stem}-{number}" for number in count(2)))
        found[next(name for name in names if name not in found and name not in taken)] = path
    return [{"name": name, "path": path} for name, path in found.items()]


_NOT_A_NAME = re.compile(r"^[^A-Za-z0-9]+|[^\w.-]+")


def help_of(error: Any) -> str:
    """The help, where click raises it because nothing was asked for; an empty string for a mistake."""
    return error.format_message() if type(error).__name__ == "NoArgsIsHelpError" else ""


def explained(error: Any) -> UsageError:
    """What click says of a command line (no such option, a missing argument), with the verb's own example."""
    context = error.ctx
    option, verbs = getattr(error, "option_name", None), getattr(context and context.command, "commands", {})
    if takes := [name for name, verb in verbs.items() if any(option in one.opts for one in verb.params)]:
        return UsageError(
            f"{option} stands before the verb",
            fix=f"Name the verb first: {context.command_path} {takes[0]} ... {option}",
        )
    path = context.command_path if context else "cla-convert"
    example = (context.command.epilog or "").removeprefix(WHOLE) if context else ""
    see = f"{path} --help says what it takes."
    return UsageError(_plain(error), fix=f"{see} {example}".strip())


def _plain(error: Any) -> str:
    """click's message with its rare words replaced, and without the full stop."""
    said = error.format_message().strip().removesuffix(".")
    for theirs, ours in _RARE.items():
        said = said.replace(theirs, ours)
    return said


_RARE = {
    "Got unexpected extra argument(s) (": "More arguments than there are places for (",
    "Got unexpected extra argument (": "More arguments than there are places for (",
    "Got unexpected extra arguments (": "More arguments than there are places for (",
    "requires an argument": "needs a value",
    "(Possible options: ": "(did you mean ",
}
"""Words of click's, of this release and of others."""
