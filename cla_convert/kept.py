"""Folders of the cache: made once, by one process while others wait, and made again where they are damaged."""

from collections.abc import Callable
from pathlib import Path

from .console import warn
from .files import read_kept, write_json
from .staging import claimed, staged

_SIZES = ".sizes.json"


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
        return _sizes(folder) == (read_kept(folder / _SIZES) or {}).get("sizes") and intact(folder)

    if whole():
        return folder
    with claimed(folder, wait=True):
        if not whole():
            if folder.exists():
                warn(f"{folder} is damaged: it is made again")
            with staged(folder, wanted=lambda: not whole()) as staging:
                make(staging)
                write_json(staging / _SIZES, {"sizes": _sizes(staging)})
    return folder


def _sizes(folder: Path) -> dict[str, int]:
    """Of every file but the record itself."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _SIZES
    }
