"""Reading a recipe: the file, `--set train.tokens=26M` on top, validation, and where every value came from."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .errors import UsageError
from .recipe import Recipe
from .recipe_mistakes import told as mistakes
from .refusals import refusal
from .removed import without_removed
from .yaml_text import Mistake, lines_of, parse

_MOST_VALUES = 10_000
_WHOLE = "A recipe is lines of `section:` with lines of `name: value` below, two spaces further in."
_LISTED = "`cla-convert recipes ls` lists those shipped; `recipes cp NAME FILE` copies one to edit."


@dataclass(frozen=True)
class Resolved:
    """A validated recipe and, for every value, where it came from: `default`, `recipe` or `--set`."""

    recipe: Recipe
    origins: dict[str, str]

    def table(self) -> str:
        """One line per value that differs from its default or was given on the command line: name, value, origin."""
        values = flatten(self.recipe.model_dump(mode="json"))
        short = flatten(self.recipe.model_dump(mode="json", exclude_defaults=True))  # of what lies in lists, too
        typed = {name for name, origin in self.origins.items() if origin != "recipe"}
        given = {name: short.get(name, value) for name, value in values.items() if name in short or name in typed}
        width = max(map(len, given), default=0)
        lines = [
            f"{name:<{width}}  {value!r:<28}  {self.origins.get(name, 'default')}" for name, value in given.items()
        ]
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
        if not equals or not name:
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
        UsageError: the file is missing or not YAML, or a key or value is not accepted.
    """
    tree = read_yaml(Path(path)) if path is not None else {}
    origins = dict.fromkeys(flatten(tree), "recipe")
    for name, value in parse_overrides(assignments or []).items():
        _assign(tree, name, value)
        origins |= dict.fromkeys(flatten(value, f"{name}.") if isinstance(value, dict) else [name], "--set")
    for name, value in (options or {}).items():
        _assign(tree, name, value)
        origins[name] = "MODEL" if name == "source.model" else f"--{name.rpartition('.')[2].replace('_', '-')}"
    try:
        return Resolved(_validated(tree), origins)
    except ValidationError as error:
        lines = {} if path is None else lines_of(Path(path).read_text(encoding="utf-8"))
        places = {name: f"{path}:{line}: " for name, line in lines.items()}
        places |= {name: f"{origin}: " for name, origin in origins.items() if origin != "recipe"}
        raise _not_valid(error, places) from error


def validate(tree: dict[str, Any]) -> Recipe:
    """Validate a nested dict. Raises UsageError with a line for every bad key or value."""
    try:
        return _validated(tree)
    except ValidationError as error:
        raise _not_valid(error, {}) from error


def _validated(tree: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(without_removed(tree))


def _not_valid(error: ValidationError, places: Mapping[str, str]) -> UsageError:
    """A line for every mistake, with its place in front where `places` has one for its dotted name."""
    return UsageError("The recipe is not valid", why="\n       ".join(mistakes(error, places)))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        UsageError: it cannot be read, is not YAML or no mapping, or unfolds to more than any recipe holds.
    """
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        why = refusal(error).why
        raise UsageError(f"Cannot read the recipe {str(path)!r}", why, _LISTED) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"The recipe {str(path)!r} is not text", "It is not encoded as UTF-8.", _LISTED) from error
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
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UsageError(f"--set {name}: {section!r} is a value, not a section")
    tree[last] = value
