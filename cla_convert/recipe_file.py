"""Reading a recipe: the file, `--set train.tokens=26M` on top, validation, and where every value came from."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .errors import UsageError, did_you_mean
from .recipe import Recipe, Section
from .removed import without_removed

_MOST_VALUES = 10_000


@dataclass(frozen=True)
class Resolved:
    """A validated recipe and, for every value, where it came from: `default`, `recipe` or `--set`."""

    recipe: Recipe
    origins: dict[str, str]

    def table(self) -> str:
        """One line per value that was given: name, value, origin."""
        values = flatten(self.recipe.model_dump(mode="json"))
        given = {name: value for name, value in values.items() if name in self.origins}
        width = max(map(len, given), default=0)
        lines = [f"{name:<{width}}  {value!r:<28}  {self.origins[name]}" for name, value in given.items()]
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
    return f"{name}: {before!r} -> {after!r}"


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """`["train.tokens=26M"]` -> `{"train.tokens": "26M"}`; values are YAML. Raises UsageError."""
    overrides: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {text!r} is not of the form a.b=value", fix="For example --set train.tokens=26M")
        try:
            overrides[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {name}: the value is not valid YAML", why=str(error)) from error
    return overrides


def load_recipe(path: str | Path | None, assignments: list[str] | None = None) -> Resolved:
    """Read a recipe file (None: defaults only), apply `--set` assignments, validate.

    Raises:
        UsageError: the file is missing or not YAML, or a key or value is not accepted.
    """
    tree = read_yaml(Path(path)) if path is not None else {}
    origins = dict.fromkeys(flatten(tree), "recipe")
    for name, value in parse_overrides(assignments or []).items():
        _assign(tree, name, value)
        origins |= dict.fromkeys(flatten(value, f"{name}.") if isinstance(value, dict) else [name], "--set")
    try:
        return Resolved(_validated(tree), origins)
    except ValidationError as error:
        places = {} if path is None else {name: f"{path}:{line}: " for name, line in _lines(Path(path)).items()}
        places |= {name: "--set: " for name, origin in origins.items() if origin == "--set"}
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
    reasons = (_place(places, one["loc"]) + _explain(one) for one in error.errors())
    return UsageError("The recipe is not valid", why="\n       ".join(reasons))


def _lines(path: Path) -> dict[str, int]:
    """The line of every key and list item in a recipe file, by its dotted name: `data.sources.0.path`."""
    found: dict[str, int] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            parts = [(key.value, key, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            parts = [(number, item, item) for number, item in enumerate(node.value)]
        else:
            return
        for name, at, value in parts:
            found[f"{prefix}{name}"] = at.start_mark.line + 1
            walk(value, f"{prefix}{name}.")

    walk(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), "")
    return found


def _place(places: Mapping[str, str], loc: tuple[int | str, ...]) -> str:
    """`mine.yaml:7: ` of the key at `loc`, or of the nearest section above it; nothing where nobody gave it."""
    names = (".".join(map(str, loc[:end])) for end in range(len(loc), 0, -1))
    return next((places[name] for name in names if name in places), "")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        UsageError: it cannot be read, is not YAML or no mapping, or unfolds to more than any recipe holds.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"Cannot read the recipe {str(path)!r}", why=str(error), fix="`cla-convert recipes ls` lists those shipped"
        ) from error
    except Exception as error:  # yaml raises what Python does for a 13th month or 10,000 brackets
        raise UsageError(f"The recipe {str(path)!r} is not valid YAML", why=f"{error}"[:1000]) from error
    if not isinstance(tree, dict):
        raise UsageError(f"The recipe {str(path)!r} holds no settings", why="It must be a YAML mapping of sections.")
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


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{name}: {_wanted(error)} (got {repr(error['input'])[:200]})"
    if ":" in str(error["loc"][-1]):
        return f"unknown key {name!r}: a space is missing after the colon"
    return f"unknown key {name!r}.{did_you_mean(str(error['loc'][-1]), _fields_at(error['loc'][:-1]))}"


_WANTED = {
    "int": "must be a whole number", "float": "must be a number", "bool": "must be true or false",
    "string": "must be text", "list": "must be a list", "dict": "must be a section: lines of `name: value`",
    "model": "must be a section: lines of `name: value`", "missing": "is missing",
}  # fmt: skip
"""Kinds of errors of pydantic, by how their names begin."""


def _wanted(error: Any) -> str:
    """What a value must be, in words of our own."""
    kind, value = error["type"].partition("_")[0], error["input"]
    said = _WANTED.get(kind) or str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if kind in ("model", "dict") and isinstance(value, str) and ":" in value:
        return f"{said}; a space is missing after the colon"
    return said


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section at `loc`, for did-you-mean."""
    section: Any = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), Section)
    return list(section.model_fields)
