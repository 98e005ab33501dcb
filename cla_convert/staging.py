"""What appears whole or not at all: made under a name of its own, synced, renamed; by one process at a time.

Names are random, and who is alive is told by locks, the kernel's (flock): each container has the same process numbers.
While one holds the lock of a name, what lies half-made beside it was left by the dead. Where a file system knows no
locks, nothing is taken for left behind.
"""

import errno
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from .console import say
from .errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_DAY = 86_400


def beside(path: Path, kind: str) -> Path:
    """A name next to `path` that nobody has: hidden, and telling what it is for and which kernel's locks guard it."""
    return path.with_name(f".{path.name}.{kind}-{_kernel()}-{uuid.uuid4().hex[:12]}")


def lock(descriptor: int, *, wait: bool = False, shared: bool = False) -> bool:
    """Lock an open file or folder until it is closed; False on file systems without locks.

    Raises:
        BlockingIOError: another process has it (not `shared`, if this one asks for no more), and `wait` is off.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextmanager
def claimed(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only process that makes `out`; what killed ones left is dropped, what they had moved aside is put back.

    Raises:
        InputError: another process is making it, and `wait` is off.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    name = out.with_name(f".{out.name}.lock")
    descriptor, held = _locked(name, out, wait=wait)
    try:
        if held:
            _clear_left(out)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                name.unlink()  # whoever waits for it sees that it is gone
            os.close(descriptor)


@contextmanager
def staged(out: Path, wanted: Callable[[], bool]) -> Iterator[Path]:
    """Yield an empty folder beside `out`. It is synced and takes the place of `out`; on an error it is removed.

    `wanted` is asked before that: without locks, another process may have been faster.
    """
    staging = beside(out, "partial")
    staging.mkdir()
    try:
        yield staging
        for path in [*staging.rglob("*"), staging]:
            sync(path)
        while wanted():
            if _swap(staging, out):
                sync(out.parent)
                break
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked(name: Path, out: Path, *, wait: bool) -> tuple[int | None, bool]:
    """The lock file, open, and whether it is locked. Who had it removes it: then another one is made."""
    while True:
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # another user's
            return None, False
        try:
            held = _lock_for(descriptor, out, wait=wait)
            if not held or is_at(name, descriptor):
                return descriptor, held
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def is_at(name: Path, descriptor: int) -> bool:
    """Whether an open file or folder still has this name.

    One call to the file system: between two, another process may remove it.
    """
    try:
        return os.path.samestat(os.fstat(descriptor), name.stat())
    except FileNotFoundError:
        return False


def _lock_for(descriptor: int, out: Path, *, wait: bool) -> bool:
    try:
        return lock(descriptor)
    except BlockingIOError as error:
        if not wait:
            raise InputError(
                f"Another process is writing {out}", fix="Wait for it to end, or give another folder."
            ) from error
    say(f"waiting for another process that makes {out}")
    return lock(descriptor, wait=True)


def _clear_left(out: Path) -> None:
    """To be called with the lock. Another kernel's locks may not be seen here: what it left must be a day old, too."""
    for folder in list(out.parent.iterdir()):
        found = re.fullmatch(rf"\.{re.escape(out.name)}\.(partial|old)-([0-9a-f]+)-[0-9a-f]+", folder.name)
        if not found:
            continue
        with suppress(FileNotFoundError):  # a process under another kernel may be at it
            if found[2] != _kernel() and time.time() - _last_change(folder) < _DAY:
                continue
            if found[1] == "old" and not out.exists():
                _renamed(folder, out)
            else:
                _removed(folder, ignore_errors=True)


def _last_change(folder: Path) -> float:
    """When something in it was written, or it was renamed."""
    states = [path.lstat() for path in [folder, *folder.rglob("*")]]
    return max(max(state.st_mtime, state.st_ctime) for state in states)


def _swap(staging: Path, out: Path) -> bool:
    """Rename staging to out; an old out is kept aside until the new one stands.

    False: without locks, another process has put its own there meanwhile, or moved it away.
    """
    if not out.exists():
        return _renamed(staging, out)
    old = beside(out, "old")
    try:
        out.rename(old)
    except FileNotFoundError:
        return False
    try:
        done = _renamed(staging, out)
    except OSError:
        old.rename(out)
        raise
    _removed(old)
    return done


def _removed(folder: Path, *, ignore_errors: bool = False) -> None:
    """A folder, or a link to one, which is not ours to empty."""
    if not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=ignore_errors)
        return
    with suppress(OSError if ignore_errors else FileNotFoundError):
        folder.unlink()


def _renamed(folder: Path, out: Path) -> bool:
    """Give a folder a name that was free; False if it is not any more."""
    try:
        folder.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


@cache
def _kernel() -> str:
    """Stands for this boot of this machine, containers included: a lock is seen there at least."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:  # not Linux
        identity = socket.gethostname()
    return hashlib.sha256(identity.encode()).hexdigest()[:8]
