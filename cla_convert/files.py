"""Small JSON files, written whole or not at all; a folder to oneself."""

import errno
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError, did_you_mean
from .refusals import refusal, unread
from .staging import beside, is_at, lock

LOCKED = "CLA_CONVERT_LOCKED"
"""Environment variable: the folder that the process which started this one has locked for it."""
_POINTER = 1024
"""Bytes that a pointer of Git LFS has at most."""
LARGEST_JSON = 1 << 28
"""Bytes of a file that is read at once: more would be no JSON of ours, and many times as much in memory."""


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write `value` to a temporary file beside `path` and rename it: a crash never leaves half a file.

    Numbers that JSON cannot hold (NaN, infinity) are written as null.
    """
    text = json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    # A lone surrogate, which JSON can name and UTF-8 cannot hold, is named again.
    write_bytes(path, f"{text}\n".encode(errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `atomic` does."""
    with atomic(path) as file:
        file.write(content)


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; it appears as `path` once it is whole and on the disk, and not at all on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path, "tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Work in `folder`, made if need be and gone again if it stays empty; raises InputError if another process does.

    The lock is the kernel's (flock, where there is one): it leaves no file, and ends with the process in any case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = None if os.environ.get(LOCKED) == str(folder.resolve()) else _lock(folder)
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # only if nothing was written
        if descriptor is not None:
            os.close(descriptor)


def check_free(folder: Path) -> None:
    """Raise InputError if another process is at work in an empty `folder`; several may ask at once.

    A lock on a folder that holds something may be anybody's (`flock DIR COMMAND`): ours is known by what a run wrote.
    """
    try:
        if any(folder.iterdir()):
            return
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # not to be read, or gone: none of ours is at work in it
        return
    try:
        lock(descriptor, shared=True)
    except BlockingIOError as error:
        raise _at_work(folder) from error
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int:
    """An open descriptor that holds the lock. On file systems without locks it holds none."""
    while True:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # whoever was alone in it has just left it empty
            folder.mkdir(parents=True, exist_ok=True)
            continue
        try:
            lock(descriptor)
        except BlockingIOError as error:
            os.close(descriptor)
            raise _at_work(folder) from error
        if is_at(folder, descriptor):
            return descriptor
        os.close(descriptor)  # gone between the two: a lock on it would hold nobody off


def _at_work(folder: Path) -> InputError:
    return InputError(f"Another process is at work in {folder}", fix="Wait for it to end, or give another folder.")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None where there is no file. Raises InputError as `load_json` does."""
    try:
        return load_json(path)
    except InputError as error:  # looking first would not do: another process may remove it in between
        if isinstance(error.__cause__, FileNotFoundError) or not path.exists():
            return None
        raise


def read_kept(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file of a cache; None where there is none, or a damaged one: what it held is made again."""
    try:
        return read_json(path)
    except InputError:
        return None


def load_json(path: Path, fix: str = "Restore or remove it.") -> dict[str, Any]:
    """The JSON object in `path`; `fix` is said where it is damaged.

    Raises:
        InputError: it is missing, cannot be read, is in an encoding that transformers does not read, or holds no JSON
            object; so a damaged file is never taken for none.
    """
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"it has {size} bytes, more than {LARGEST_JSON}")
        data = path.read_bytes()
        _refuse_mark(path, data)
        value = json.loads(data)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except OSError as error:
        damaged = InputError(f"{path} cannot be read", refusal(error).why, fix)
        raise unread(error, damaged) from error
    except json.JSONDecodeError as error:
        why = f"From line {error.lineno}, column {error.colno} on it is not valid JSON."
        raise InputError(f"{path} cannot be read", why, fix) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read", why=f"{error}.", fix=fix) from error
    if not isinstance(value, dict):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise InputError(f"{path} cannot be read", f"It holds {kind}, and no JSON object.", fix)
    return value


def refuse_pointer(path: Path) -> None:
    """Raise InputError if a file that is there is what git leaves in place of a large one which it did not fetch."""
    if path.is_file() and path.stat().st_size < _POINTER and path.read_bytes().startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path} is not the file itself",
            why="It is a pointer of Git LFS: the folder was cloned without its large files.",
            fix="Install Git LFS (`git lfs install`) and run `git lfs pull` in the folder, or download the model anew "
            "(`hf download`).",
        )


def _refuse_mark(path: Path, data: bytes) -> None:
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise InputError(
            f"{path} is not plain UTF-8",
            why="It begins with a byte order mark (of Windows' editors) or is UTF-16; transformers reads neither.",
            fix="Save it as UTF-8 without a mark (BOM).",
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl file, none if it is not there. A last line that a kill cut short is left out.

    Raises InputError for any other damage.
    """
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return rows
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                continue
            raise InputError(
                f"{path} is damaged", why=f"Line {number}: {error}.", fix="Restore or remove it."
            ) from error
        if isinstance(row, dict):
            rows.append(row)
    return rows


def path_of(written: Path | str) -> Path:
    """A path as people write it. `~` is the home folder; where there is none, a name like any other."""
    try:
        return Path(written).expanduser()
    except RuntimeError:
        return Path(written)


def is_place(model: str) -> bool:
    """Whether `model` can only be a path: it is written as one, or is no possible id of the hub."""
    return model.startswith((".", "/", "~")) or model.endswith(".gguf") or not _HUB_ID.fullmatch(model)


_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def existing(folder: Path) -> Path:
    """A folder, or the nearest above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def stays_in(path: Path, folder: Path) -> bool:
    """Whether a file lies in `folder`, links followed; or where the hub's cache keeps the files of a snapshot."""
    target, root = path.resolve(), folder.resolve()
    return target.is_relative_to(root) or target.is_relative_to(root.parent.parent / "blobs")


def check_place(folder: Path) -> None:
    """Raise InputError if `folder` can be neither written to nor made: a file, permissions or the disk forbid it."""
    for one in (folder, *folder.absolute().parents):
        if one.is_dir():
            if not os.access(one, os.W_OK | os.X_OK):
                read_only = os.statvfs(one).f_flag & os.ST_RDONLY
                raise refusal(OSError(errno.EROFS if read_only else errno.EACCES, "", str(one)))
            return
        if os.path.lexists(one):
            what = "file" if one.exists() else "link that leads nowhere"
            raise InputError(f"{one} is a {what}", "A folder is needed there.", "Give another place.")


def did_you_mean_path(path: Path) -> str:
    """` Did you mean 'x'?` for what lies where `path` should and has nearly its name; an empty string for nothing."""
    try:
        return did_you_mean(path.name, [entry.name for entry in path.parent.iterdir() if entry.name != path.name])
    except OSError:  # no such folder, or not to be read
        return ""


def looked_in(path: Path) -> str:
    """`A relative path counts from the folder that you are in, /here.`; an empty string for another path."""
    return "" if path.is_absolute() else f"Relative paths count from the folder that you are in, {Path.cwd()}."


def models_in(folder: Path) -> str:
    """`Give a model in it: runs/a/converted, ...` of a folder that holds models; an empty string for another."""
    found = sorted(path.parent for path in folder.glob("*/config.json"))
    return f"Give a model in it: {', '.join(map(str, found[:4]))}{', ...' if found[4:] else ''}." if found else ""


def plain(value: Any) -> Any:
    """`value` with tuples as lists, numpy scalars as Python numbers, paths as text, non-finite numbers as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # numpy and torch scalars
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
