"""What the schema finds wrong with a recipe, a line for each setting, in words of our own."""

import math
import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from .errors import did_you_mean
from .recipe import Recipe, Section


class Origin(NamedTuple):
    """Where a setting was given, as it is told: `mine.yaml:7: ` or `--set: `."""

    name: str
    value: str
    """Of its value, which may begin in another line."""

    @property
    def typed(self) -> bool:
        """Whether it was given on the command line, by an option or --set."""
        return self.value.startswith("--")


@dataclass(frozen=True)
class _Mistake:
    """One of pydantic's errors."""

    place: tuple[int | str, ...]
    """Of the value: names of settings and numbers of list items, without pydantic's names for alternatives."""
    choice: tuple[int | str, ...]
    """Of the setting with alternatives (a number or auto) that the value is one of, or `place`."""
    alternative: str
    """pydantic's name for the alternative that it is a mistake of."""
    what: str
    got: str
    of_name: bool
    """Whether the name is wrong, or the section as a whole, and not the value."""
    meant: Any = None
    """The value as it was meant, where that can be told."""
    bare: bool = False
    """A number, or a yes or no, where text belongs."""
    unlike: bool = False
    """A name that resembles no other: only the list of all settings helps."""


def mistakes(error: ValidationError, tree: Any, places: Mapping[str, Origin]) -> tuple[list[str], bool]:
    """A line for every mistake in `tree`, with its origin in front where `places` has one for its dotted name.

    And whether only the list of all settings helps with one of them.
    """
    found = [_mistake(one, tree) for one in error.errors()]
    lines: dict[tuple[object, ...], str] = {}
    for mistake in found:
        alternatives = _closest([other for other in found if other.choice == mistake.choice])
        if mistake not in alternatives:
            continue
        fitting = [other for other in alternatives if other.place == mistake.place]
        first, *more = dict.fromkeys(other.what for other in fitting)
        said = ", or ".join([first, *(one.removeprefix("must be ") for one in more)])
        said += "; put it into quotes" if mistake.bare and not more else ""
        got = min(other.got for other in fitting)
        lines[mistake.choice, mistake.place] = f"{_named(places, mistake, said)}{got}{_meant(places, mistake, said)}"
    return list(lines.values()), any(mistake.unlike for mistake in found)


def _meant(places: Mapping[str, Origin], mistake: _Mistake, said: str) -> str:
    """How to write a list of which only the content was given, or quotes that a shell leaves alone."""
    name = ".".join(part for part in mistake.place if isinstance(part, str))
    typed = _origin(places, mistake).startswith("--set")
    if mistake.meant is not None:
        form = yaml.safe_dump(
            mistake.meant, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False
        ).strip()
    elif typed and said.endswith("into quotes") and name == ".".join(map(str, mistake.place)):
        form = '"..."'
    else:
        return ""
    return f": --set {shlex.quote(f'{name}={form}')}" if typed else f": {name.rpartition('.')[2]}: {form}"


def _as_list(place: tuple[int | str, ...], tree: Any) -> Any:
    """A word where a list of words or sections belongs, or words among its sections, as the list that was meant.

    None where a setting would not take that list either.
    """
    *above, last = place[:-1] if place and isinstance(place[-1], int) else place or ("",)
    outer: Any = Recipe
    with suppress(ValidationError, LookupError, TypeError):  # a place may be of what a validator has made of the value
        for part in above:
            outer, tree = outer if isinstance(part, int) else _section(outer, part), tree[part]
        fields, given = _section(outer, str(last)).model_fields, tree[last]
        meant = [_as_section(one, fields) for one in (given if isinstance(given, list) else [given])]
        outer.model_validate({str(last): meant})
        return meant if meant != given else None
    return None


def _as_section(one: Any, fields: Collection[str]) -> Any:
    """A path as the section that it stands for."""
    if "path" not in fields or not isinstance(one, str) or ":" in one:
        return one
    name = _NO_NAME.sub("-", PurePath(one).stem).strip("-._") if "name" in fields else ""
    return {"name": name, "path": one} if name else {"path": one}


def _closest(alternatives: list[_Mistake]) -> list[_Mistake]:
    """Mistakes of the alternatives that fit a value best: as deep in it as any, and no more of them than need be."""
    deepest = max(len(one.place) for one in alternatives)
    deep = [one for one in alternatives if len(one.place) == deepest]
    counts = Counter(one.alternative for one in deep)
    return [one for one in deep if counts[one.alternative] == min(counts.values())]


def _named(places: Mapping[str, Origin], mistake: _Mistake, said: str) -> str:
    """What is wrong, behind its origin and the name of the setting, unless an option or the words name it."""
    name, origin = ".".join(map(str, mistake.place)), _origin(places, mistake)
    named = said.startswith("unknown key") or (origin.startswith("--") and origin != "--set: ")
    return f"{origin}{said}" if named or not name else f"{origin}{name}: {said}"


def _origin(places: Mapping[str, Origin], mistake: _Mistake) -> str:
    """`mine.yaml:7: ` of what is wrong, of what made it a section (`--set`), or of the nearest section above it."""
    names = [".".join(map(str, mistake.place[:end])) for end in range(len(mistake.place), 0, -1)]
    below = [name for name in places if names and name.startswith(f"{names[0]}.")]
    below.sort(key=lambda name: _told_of(name, mistake))  # of settings that do not fit together, those it speaks of
    if typed := [name for name in below if places[name].typed and _told_of(name, mistake) < len(mistake.what)]:
        names = [*typed, *names]  # the file alone was right
    known = next((places[name] for name in [*names[:1], *below, *names[1:]] if name in places), Origin("", ""))
    return known.name if mistake.of_name else known.value


def _told_of(name: str, mistake: _Mistake) -> int:
    """Where the words of a mistake name a setting, as an index; behind their end if they do not."""
    found = re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", mistake.what)
    return found.start() if found else len(mistake.what)


def _mistake(error: Any, tree: Any) -> _Mistake:
    kind, value = error["type"], error["input"]
    place, choice, alternative = _place(error["loc"])
    if kind == "extra_forbidden":
        what, unlike = _unknown(place)
        return _Mistake(place, choice, alternative, what, "", of_name=True, unlike=unlike)
    ours = kind == "value_error"  # said by validators of ours, which name the value
    got = "" if ours or kind == "missing" else f" (got {'nothing' if value is None else repr(value)[:200]})"
    whole = kind == "missing" or (ours and isinstance(value, dict))
    wanted = _wanted(error)
    kind = kind.partition("_")[0]
    meant = _as_list(place, tree) if kind in ("list", "model") else None
    bare = kind == "string" and isinstance(value, (bool, int, float))
    return _Mistake(place, choice, alternative, wanted, got, of_name=whole, meant=meant, bare=bare)


def _unknown(place: tuple[int | str, ...]) -> tuple[str, bool]:
    """What is wrong with a name, and whether nothing is like it."""
    name, last = ".".join(map(str, place)), str(place[-1])
    if ":" in last:
        return f"unknown key {name!r}: a space is missing after the colon", False
    section: Any = Recipe
    for part in place[:-1]:
        section = section if isinstance(part, int) else _section(section, part)
    hint = did_you_mean(last, list(section.model_fields)) or _belongs(last)
    return f"unknown key {name!r}.{hint}", not hint


def _belongs(name: str) -> str:
    """Where a setting belongs, if a section has it."""
    homes = [home for home in Recipe.model_fields if name in _section(Recipe, home).model_fields]
    return f" It belongs below `{homes[0]}:`." if homes else ""


def _section(section: Any, name: str) -> Any:
    """The section that a field holds, itself or as list items; one without fields if it holds none."""
    annotation = section.model_fields[name].annotation if name in section.model_fields else None
    parts = [annotation, *getattr(annotation, "__args__", ())]
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), Section)


def _place(loc: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], tuple[int | str, ...], str]:
    """Where a value is, where its alternatives begin, and the one meant.

    From pydantic's path, which also names types and functions.
    """
    place: list[int | str] = []
    choice: tuple[int | str, ...] | None = None
    alternative = ""
    section: Any = Recipe
    for part in loc:
        if isinstance(part, int) or part in section.model_fields or not _TYPE.fullmatch(part):
            place.append(part)
            section = section if isinstance(part, int) else _section(section, part)
        elif part != "[key]" and choice is None:
            choice, alternative = tuple(place), part
    return tuple(place), tuple(place) if choice is None else choice, alternative


_NO_NAME = re.compile(r"[^\w.-]+")
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
    if kind in ("model", "dict", "list") and isinstance(value, str) and re.match(r"[A-Za-z_]\w*:[^\s/\\]", value):
        return f"{said}; a space is missing after the colon"
    return said
