"""What the schema finds wrong with a recipe, a line for each setting, in words of our own."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from .errors import did_you_mean
from .recipe import Recipe, Section


@dataclass(frozen=True)
class _Mistake:
    """One of pydantic's errors."""

    place: tuple[int | str, ...]
    """Of the value: names of settings and numbers of list items, without pydantic's names for alternatives."""
    choice: tuple[int | str, ...]
    """Of the setting with alternatives (a number or auto) that the value is one of, or `place`."""
    what: str
    got: str


def told(error: ValidationError, places: Mapping[str, str]) -> list[str]:
    """A line for every mistake, with its origin in front where `places` has one for its dotted name."""
    found = [_mistake(one) for one in error.errors()]
    lines: dict[tuple[object, ...], str] = {}
    for mistake in found:
        alternatives = [other for other in found if other.choice == mistake.choice]
        if len(mistake.place) < max(len(other.place) for other in alternatives):
            continue  # another alternative fits better
        fitting = [other for other in alternatives if other.place == mistake.place]
        first, *more = dict.fromkeys(other.what for other in fitting)
        said = ", or ".join([first, *(one.removeprefix("must be ") for one in more)])
        got = min(other.got for other in fitting)
        lines[mistake.choice, mistake.place] = f"{_named(places, mistake.place, said)}{got}"
    return list(lines.values())


def _named(places: Mapping[str, str], place: tuple[int | str, ...], said: str) -> str:
    """What is wrong, behind its origin and the name of the setting, unless an option or the words name it."""
    name, origin = ".".join(map(str, place)), _origin(places, place)
    named = said.startswith("unknown key") or (origin.startswith("--") and origin != "--set: ")
    return f"{origin}{said}" if named or not name else f"{origin}{name}: {said}"


def _origin(places: Mapping[str, str], place: tuple[int | str, ...]) -> str:
    """`mine.yaml:7: ` of the key at `place`, or of the nearest section above it; nothing where nobody gave it."""
    names = (".".join(map(str, place[:end])) for end in range(len(place), 0, -1))
    return next((places[name] for name in names if name in places), "")


def _mistake(error: Any) -> _Mistake:
    place, choice = _place(error["loc"])
    if error["type"] == "extra_forbidden":
        return _Mistake(place, choice, _unknown(place), "")
    ours = error["type"] == "value_error"  # said by validators of ours, which name the value
    got = "" if ours or error["type"] == "missing" else f" (got {repr(error['input'])[:200]})"
    return _Mistake(place, choice, _wanted(error), got)


def _unknown(place: tuple[int | str, ...]) -> str:
    name, last = ".".join(map(str, place)), str(place[-1])
    if ":" in last:
        return f"unknown key {name!r}: a space is missing after the colon"
    section: Any = Recipe
    for part in place[:-1]:
        section = section if isinstance(part, int) else _section(section, part)
    return f"unknown key {name!r}.{did_you_mean(last, list(section.model_fields))}"


def _section(section: Any, name: str) -> Any:
    """The section that a field holds, itself or as list items; one without fields if it holds none."""
    annotation = section.model_fields[name].annotation if name in section.model_fields else None
    parts = [annotation, *getattr(annotation, "__args__", ())]
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), Section)


def _place(loc: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:
    """Where a value is and where its alternatives begin, from pydantic's path, which also names types and functions."""
    place: list[int | str] = []
    choice: tuple[int | str, ...] | None = None
    section: Any = Recipe
    for part in loc:
        if isinstance(part, int) or part in section.model_fields or not _TYPE.fullmatch(part):
            place.append(part)
            section = section if isinstance(part, int) else _section(section, part)
        elif part != "[key]" and choice is None:
            choice = tuple(place)
    return tuple(place), tuple(place) if choice is None else choice


_TYPE = re.compile(
    r"(constrained-)?(int|float|bool|str|Generate)|(list|literal|function-\w+|nullable|tuple)\[.*\]|\[key\]"
)
"""pydantic's names for the alternatives of a setting."""

_WANTED = {
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must begin with a letter or digit and have letters, digits, `_`, `.` and `-` only",
    "finite_number": "must be a finite number",
    "int": "must be a whole number", "float": "must be a number", "bool": "must be true or false",
    "string": "must be text", "list": "must be a list", "tuple": "must be a list",
    "dict": "must be a section: lines of `name: value`", "model": "must be a section: lines of `name: value`",
    "missing": "is missing",
}  # fmt: skip
"""Kinds of pydantic's errors, whole or by how their names begin."""
_BOUNDS = {
    "greater_than_equal": "must be {ge:g} or more", "greater_than": "must be greater than {gt:g}",
    "less_than_equal": "must be {le:g} or less", "less_than": "must be less than {lt:g}",
    "literal_error": "must be {expected}", "too_short": "must be a list of {min_length} or more",
    "too_long": "must be a list of {max_length} or fewer",
}  # fmt: skip
"""The same, with what they name."""


def _wanted(error: Any) -> str:
    """What a value must be."""
    name, value = error["type"], error["input"]
    if name in _BOUNDS:
        said = _BOUNDS[name].format(**error["ctx"])
        hint = did_you_mean(value, re.findall(r"'([^']+)'", said)) if isinstance(value, str) else ""
        return f"{said}{'.' if hint else ''}{hint}"
    kind = name.partition("_")[0]
    said = _WANTED.get(name) or _WANTED.get(kind) or str(error["msg"]).removeprefix("Value error, ")
    if kind in ("model", "dict") and isinstance(value, str) and ":" in value:
        return f"{said}; a space is missing after the colon"
    return said
