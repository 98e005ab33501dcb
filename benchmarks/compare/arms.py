"""What is compared, read from YAML: every arm as a recipe and the settings that it runs under."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cla_convert.errors import UsageError, did_you_mean
from cla_convert.recipe_file import load_recipe, parse_overrides, read_yaml
from cla_convert.recipes import find_recipe

Settings = dict[str, Any]
KEYS = {"model", "from", "budget", "settings", "cache", "alone"}


@dataclass(frozen=True)
class Arm:
    """One run."""

    name: str
    recipe: str
    settings: Settings
    parent: str | None = None
    """The arm whose converted model it starts from."""
    cache: str | None = None
    """Not a training: the parent's models with such a KV cache (quantised_cache.py)."""
    alone: bool = False
    """Whether nothing else may run beside it."""

    @property
    def converts_only(self) -> bool:
        """Whether others may start from it."""
        return self.cache is None and not self.settings.get("train.tokens")

    @property
    def options(self) -> list[str]:
        """The settings as words of a command line."""
        return [word for name, value in self.settings.items() for word in ("--set", f"{name}={_text(value)}")]


@dataclass(frozen=True)
class Table:
    """Arms that answer a question together."""

    title: str
    arms: Sequence[str]


@dataclass(frozen=True)
class Comparison:
    """All arms, in the order of their worth, and the tables that they stand in."""

    arms: Mapping[str, Arm]
    tables: Sequence[Table]


def read_comparison(
    arms: Path, size: Path, *, models: Mapping[str, str], assignments: Sequence[str], only: Sequence[str]
) -> Comparison:
    """Read the list of arms and what a size of it means; check every arm as a recipe before any work.

    Args:
        arms: models, arms and tables.
        size: settings of all arms, and what each budget is.
        models: where to find a model of the list, instead of where its recipe says.
        assignments: `--set` for all arms.
        only: patterns of names; arms that these start from come along.

    Raises:
        UsageError: an arm names what there is not, or its settings are no recipe.
    """
    listed, sizes = read_yaml(arms), read_yaml(size)
    budgets, everywhere = sizes.get("budgets", {}), sizes.get("settings", {}) | parse_overrides([*assignments])
    for name in models:
        _known(name, listed["models"], "--model")
    found: dict[str, Arm] = {}
    for name, entry in listed["arms"].items():
        found[name] = _arm(name, entry, found, listed["models"], budgets, everywhere, models)
        load_recipe(find_recipe(found[name].recipe), found[name].options[1::2])
    tables = [Table(table["title"], table["arms"]) for table in listed["tables"]]
    for table in tables:
        for name in table.arms:
            _known(name, found, table.title)
    return Comparison(_chosen(found, only), tables)


def _arm(
    name: str,
    entry: Settings,
    before: Mapping[str, Arm],
    models: Mapping[str, Settings],
    budgets: Mapping[str, Settings],
    everywhere: Settings,
    places: Mapping[str, str],
) -> Arm:
    if unknown := entry.keys() - KEYS:
        raise UsageError(f"{name}: there is no {min(unknown)!r}", fix=f"Of an arm there are {', '.join(sorted(KEYS))}.")
    parent, budget = entry.get("from"), entry.get("budget")
    if parent:
        _known(parent, before, f"{name}: from")
        if not (entry.get("cache") or before[parent].converts_only):
            raise UsageError(f"{name}: {parent} is trained already", fix="Start from an arm without a budget.")
        recipe, settings = before[parent].recipe, before[parent].settings
    else:
        model = entry.get("model", "")
        _known(model, models, f"{name}: model")
        recipe, place = models[model]["recipe"], places.get(model)
        settings = models[model].get("settings", {}) | ({"source.model": place} if place else {})
        settings |= {"train.tokens": 0} | everywhere
    if budget:
        _known(budget, budgets, f"{name}: budget")
    settings = settings | budgets.get(budget, {}) | entry.get("settings", {})
    return Arm(name, recipe, settings, parent, entry.get("cache"), entry.get("alone", False))


def _known(name: str, there_are: Mapping[str, Any], where: str) -> None:
    if name not in there_are:
        raise UsageError(f"{where}: there is no {name!r}.{did_you_mean(name, [*there_are])}", fix=", ".join(there_are))


def _chosen(arms: Mapping[str, Arm], only: Sequence[str]) -> dict[str, Arm]:
    """Arms whose names match, and those they start from, in the list's order."""
    names = {name for name in arms if not only or any(fnmatch(name, pattern) for pattern in only)}
    for name in reversed(arms):  # from the last, because an arm starts from an earlier one
        if name in names and (parent := arms[name].parent):
            names.add(parent)
    return {name: arm for name, arm in arms.items() if name in names}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
