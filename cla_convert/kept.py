"""Folders of the cache: made once, by one process while others wait, and made again where they are damaged.

What was not used for long can be removed: copies of sources that have changed since stay otherwise.
"""

import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

from .console import warn
from .environment import CacheKind
from .errors import InputError
from .files import read_kept, write_json
from .refusals import refusal
from .staging import claimed, staged

_SIZES = ".sizes.json"
_NAMES = re.compile(
    r"(.*-)?[0-9a-f]{16,}(-\d+)?(\.json)?|[^@]+@[^@]+|\..+\.(lock|\w+-[0-9a-f]+-[0-9a-f]+)|\.activations-.+"
)
"""Of what is ours: a hash of what it is made from, a commit's, or hidden while it is made. People let CLA_CONVERT_CACHE
name folders that hold other things."""
_DAY = 86_400
"""Seconds."""


def kept(folder: Path, make: Callable[[Path], object], *, intact: Callable[[Path], bool] = lambda _: True) -> Path:
    """`folder`, as it is if it is whole, otherwise filled by `make`, which is given an empty folder to write into.

    Args:
        folder: named after all that its content depends on.
        make: writes the content.
        intact: looks at the content, besides the sizes of its files.

    Raises:
        InputError: what `make` raises; then nothing is left.
    """

    def whole() -> bool:
        try:
            recorded, there = (read_kept(folder / _SIZES) or {}).get("sizes"), _sizes(folder)
            if not isinstance(recorded, dict) or not recorded.items() <= there.items():
                return False
            return intact(folder)  # what else lies there is the system's: .DS_Store, .nfs0000...
        except FileNotFoundError:  # another process is replacing or removing it
            return False

    if whole():
        with suppress(OSError):  # another user's
            os.utime(folder / _SIZES)  # when it was used last, on disks that keep no such time
        return folder
    with claimed(folder, wait=True):
        if not whole():
            if folder.exists():
                warn(f"{folder} is damaged: it is made again")
            with staged(folder, wanted=lambda: not whole()) as staging:
                make(staging)
                write_json(staging / _SIZES, {"sizes": _sizes(staging)})
    return folder


def note(path: Path, value: Any) -> None:
    """Keep a small result in a file of the cache. Where that is full or may not be written to, work goes on without."""
    try:
        write_json(path, value, indent=None)
    except OSError as error:
        _say_not_kept(path.parent, str(refusal(error).why))


@cache
def _say_not_kept(folder: Path, why: str) -> None:
    warn(f"results are not kept in {folder} for the next time: {why}")


@dataclass(frozen=True)
class Entry:
    """Something in a cache."""

    path: Path
    bytes: int
    used: float
    """When it was read or written last."""

    @property
    def days(self) -> int:
        """Whole days since."""
        return max(0, int((time.time() - self.used) // _DAY))


def entries(folder: Path) -> list[Entry]:
    """What a cache holds, the largest first: the files and folders in its folders, a folder a kind."""
    kinds = [folder / kind for kind in get_args(CacheKind) if (folder / kind).is_dir()]
    found = [_entry(path) for kind in kinds for path in kind.iterdir() if _NAMES.fullmatch(path.name)]
    return sorted(filter(None, found), key=lambda entry: -entry.bytes)


def remove(entry: Entry) -> bool:
    """Remove an entry; not one that another process is making, or another user's. Says so, and whether it is gone."""
    try:
        with claimed(entry.path):
            shutil.rmtree(entry.path) if entry.path.is_dir() else entry.path.unlink(missing_ok=True)
    except (InputError, OSError) as error:
        warn(f"{entry.path} stays: {error.what if isinstance(error, InputError) else refusal(error).why}")
        return False
    return True


def _entry(path: Path) -> Entry | None:
    """None where it has just gone."""
    try:
        states = [one.lstat() for one in (path, *path.rglob("*")) if not one.is_dir()]
        used = max((max(state.st_mtime, state.st_atime) for state in states), default=path.lstat().st_mtime)
        return Entry(path, sum(state.st_size for state in states), used)
    except FileNotFoundError:
        return None


def _sizes(folder: Path) -> dict[str, int]:
    """Of every file but the record itself."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _SIZES
    }
