"""What can be added to: initialisations, losses, sharing patterns, sections of the report.

Entries have names, and each is registered by its own file.

The entries of the package are the modules of one folder, imported when a name is first asked for; others are there
once whoever wrote them has imported their module. Those modules import nothing heavy, because `--help` and a recipe
ask for the names.
"""

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Generic, Protocol, TypeVar

from .errors import UsageError, did_you_mean


class Entry(Protocol):
    """What every registry knows of its entries."""

    @property
    def name(self) -> str:
        """As a recipe and the command line spell it."""
        ...

    @property
    def summary(self) -> str:
        """What it does, in a sentence for help texts and docs/recipe.md."""
        ...


T = TypeVar("T", bound=Entry)


class Registry(Generic[T]):
    """Entries of one kind, in the order in which their modules were imported."""

    def __init__(self, kind: str, folder: str) -> None:
        """Nothing is imported yet.

        Args:
            kind: what an entry is, in words.
            folder: dotted name of the package whose modules register the entries that ship.
        """
        self.kind, self._folder = kind, folder
        self._entries: dict[str, T] = {}
        self._complete = False

    def register(self, entry: T) -> T:
        """Add an entry. Raises ValueError if its name is taken."""
        if entry.name in self._entries:
            raise ValueError(f"there is a {self.kind} {entry.name!r} already")
        self._entries[entry.name] = entry
        return entry

    def named(self, name: str) -> T:
        """The entry of a name. Raises UsageError, naming those there are."""
        found = next((entry for entry in self if entry.name == name), None)
        if found is None:
            raise UsageError(
                f"There is no {self.kind} {name!r}.{did_you_mean(name, self.names())}",
                fix=f"Give one of {', '.join(map(repr, self.names()))}.",
            )
        return found

    def check(self, name: str) -> None:
        """Raise UsageError for a value that a recipe may not give."""
        self.named(name)

    def names(self) -> list[str]:
        """All names."""
        return [entry.name for entry in self]

    def summaries(self) -> str:
        """Every entry with its summary, for the docs."""
        return " ".join(f"{entry.name}: {entry.summary}" for entry in self)

    def __iter__(self) -> Iterator[T]:
        if not self._complete:
            self._complete = True
            for module in pkgutil.iter_modules(import_module(self._folder).__path__):
                import_module(f"{self._folder}.{module.name}")
        return iter(list(self._entries.values()))


INITIALISATIONS = "cla_convert.conversion.initialisation:INITIALISATIONS"
PATTERNS = "cla_convert.conversion.pattern:PATTERNS"
LOSSES = "cla_convert.training.train_loss:LOSSES"


def registry_at(place: str) -> Registry[Any]:
    """The registry `module:NAME`, imported by name: the schema of recipes lies below the packages that have them."""
    module, _, name = place.partition(":")
    found = getattr(import_module(module), name)
    assert isinstance(found, Registry), place
    return found
