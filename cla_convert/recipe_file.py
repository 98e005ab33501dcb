"""Reading a recipe: the file, `--set train.tokens=26M` on top, validation, and where every value came from."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .errors import UsageError
from .recipe import Recipe
from .recipe_mistakes import Origin, mistakes
from .recipe_places import refuse_beside
from .refusals import refusal
from .removed import without_removed
from .yaml_text import Mistake, lines_of, parse

_MOST_VALUES = 10_000
_MOST_MISTAKES = 12
"""That are told at once: a file with more is no recipe."""
_WHOLE = "A recipe is lines of `section:` with lines of `name: value` below, two spaces further in."
_LISTED = "`cla-convert recipes ls` lists those shipped; `recipes cp NAME FILE` copies one to edit."

_ALL_SETTINGS = "`cla-convert recipes reference` lists every setting and what it may be."


@dataclass(frozen=True)
class Resolved:
    """A validated recipe and, for every value, where it came from: `default`, `recipe` or `--set`."""

    recipe: Recipe
    origins: dict[str, str]

    def table(self) -> str:
        """One line per value that differs from its default or was given on the command line: name, origin, value."""
        values = flatten(self.recipe.model_dump(mode="json"))
        short = flatten(self.recipe.model_dump(mode="json", exclude_defaults=True))  # of what lies in lists, too
        typed = {name for name, origin in self.origins.items() if origin != "recipe"}
        given = {name: short.get(name, value) for name, value in values.items() if name in short or name in typed}
        origins = {name: self.origins.get(name, "default") for name in given}
        width, narrow = (max(map(len, words), default=0) for words in (given, origins.values()))
        lines = [f"{name:<{width}}  {origins[name]:<{narrow}}  {value!r}" for name, value in given.items()]
        return "\n".join([*lines, f"{len(values) - len(given)} other settings have their defaults"])


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def is_named(name: str, given: Collection[str]) -> bool:
    """Whether a setting is among those given, itself or by its section: `train` stands for `train.*`."""
    return any(name == one or name.startswith(f"{one}.") for one in given)


def told(name: str, before: Any, after: Any) -> str:
    """A setting that changed: `train.clip: 1.0 -> 0.5`."""
    return f"{name}: {_given(before)!r} -> {_given(after)!r}"


def _given(value: Any) -> Any:
    """A value without what nobody gave in the sections that lie in lists."""
    if isinstance(value, list):
        return [_given(one) for one in value]
    return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """`["train.tokens=26M"]` -> `{"train.tokens": "26M"}`; values are YAML. Raises UsageError."""
    overrides: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not all(name.split(".")):
            raise UsageError(f"--set {text!r} is not of the form a.b=value", fix="For example --set train.tokens=26M")
        try:
            overrides[name.strip()] = parse(value)
        except Mistake as error:
            raise UsageError(f"--set {name}: {value!r} is not valid YAML", why=error.why, fix=error.fix) from error
    return overrides


def load_recipe(
    path: str | Path | None, assignments: list[str] | None = None, options: Mapping[str, Any] | None = None
) -> Resolved:
    """Read a recipe file (None: defaults only), apply `--set` assignments, then options of a verb, and validate.

    Options are settings by their dotted names. On the command line they are spelled as the last part of it: `--tokens`.

    Raises:
        UsageError: the file is missing or not YAML, a key or value is not accepted, or a path is meant from its folder.
    """
    text = "" if path is None else _text(Path(path))  # once: a pipe has no second time
    tree = {} if path is None else _tree(Path(path), text)
    origins = dict.fromkeys(flatten(tree), "recipe")
    overrides = parse_overrides(assignments or [])
    for name, value in overrides.items():
        _assign(tree, name, value)
        origins |= dict.fromkeys(flatten(value, f"{name}.") if isinstance(value, dict) else [name], "--set")
    for name, value in (options or {}).items():
        _assign(tree, name, value)
        origins[name] = "MODEL" if name == "source.model" else f"--{name.rpartition('.')[2].replace('_', '-')}"
    try:
        recipe = _validated(tree)
    except ValidationError as error:
        lines = {} if path is None else lines_of(text)
        replaced = [*overrides, *(options or {})]  # whole, whatever the file has below these names
        places = {
            name: Origin(f"{path}:{at.name}: ", f"{path}:{at.value}: ")
            for name, at in lines.items()
            if not is_named(name, replaced)
        }
        places |= {name: Origin(f"{o}: ", f"{o}: ") for name, o in origins.items() if o != "recipe"}
        raise _not_valid(*mistakes(error, tree, places), path) from error
    if path is not None:
        refuse_beside(recipe, Path(path), origins)
    return Resolved(recipe, origins)


def validate(tree: dict[str, Any]) -> Recipe:
    """Validate a nested dict. Raises UsageError with a line for every bad key or value."""
    try:
        return _validated(tree)
    except ValidationError as error:
        raise _not_valid(*mistakes(error, tree, {}), "the recipe") from error


def _validated(tree: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(without_removed(tree))


def _not_valid(lines: list[str], only_the_list_helps: bool, path: str | Path | None) -> UsageError:
    """Of a recipe (None: there is none), or of the command line where only that is wrong: then what is wrong leads."""
    fix = _ALL_SETTINGS if only_the_list_helps else ""
    of_recipe = path is not None and not all(line.startswith(("--", "MODEL: ")) for line in lines)
    if of_recipe or len(lines) > 1:
        if len(lines) > _MOST_MISTAKES:
            lines = [*lines[:_MOST_MISTAKES], f"and {len(lines) - _MOST_MISTAKES} more."]
        what = "The recipe is not valid" if of_recipe else "The command line is not valid"
        return UsageError(what, "\n       ".join(lines), fix)
    return UsageError(lines[0], fix=fix)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        UsageError: it cannot be read, is not YAML or no mapping, or unfolds to more than any recipe holds.
    """
    return _tree(path, _text(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        told = refusal(error)
        fix = told.fix if isinstance(error, PermissionError) else _LISTED
        raise UsageError(f"Cannot read the recipe {str(path)!r}", told.why, fix) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"The recipe {str(path)!r} is not text", "It is not encoded as UTF-8.", _LISTED) from error


def _tree(path: Path, text: str) -> dict[str, Any]:
    try:
        tree = parse(text)
    except Mistake as error:
        place = f"{path}:{error.line}: " if error.line else ""
        raise UsageError(f"The recipe {str(path)!r} is not valid YAML", f"{place}{error.why}", error.fix) from error
    if not isinstance(tree, dict):
        raise UsageError(f"The recipe {str(path)!r} holds no settings", _WHOLE, _LISTED)
    if _too_large(tree):
        raise UsageError(f"The recipe {str(path)!r} has more than {_MOST_VALUES} values, or contains itself")
    return tree


def _too_large(tree: Any) -> bool:
    """Whether walking a tree takes too many steps: a few aliases of aliases name more values than fit into memory."""
    waiting, seen = [tree], 0
    while waiting and seen <= _MOST_VALUES:
        value = waiting.pop()
        seen += 1
        if isinstance(value, (dict, list)):
            seen += len(value)
            waiting.extend(list(value.values() if isinstance(value, dict) else value)[:_MOST_VALUES])
    return seen > _MOST_VALUES


def _assign(tree: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    if item := re.match(r"(.+?)(?:\.\d+|\[\d+\])(?=\.|$)", name):
        raise UsageError(
            f"--set {name}: one item of a list cannot be set",
            fix=f"Give the whole list, in the recipe or as --set '{item[1]}=[...]'.",
        )
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UsageError(f"--set {name}: {section!r} is a value, not a section")
    tree[last] = value
