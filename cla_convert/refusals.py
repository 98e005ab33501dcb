"""What the system says about a path (no such file, no permission, disk full), as what / why / how to fix it."""

import errno
import os
import re
from pathlib import Path

from .errors import InputError

_REASONS = {
    errno.ENOENT: ("There is no such file or folder.", "Check the spelling."),
    errno.ENOTDIR: ("A part of the path is a file, not a folder.", "Give a path below a folder."),
    errno.EISDIR: ("It is a folder, and a file is needed.", "Name a file in it."),
    errno.EEXIST: ("There is something of that name already.", "Give another name, or move it away."),
    errno.ENOTEMPTY: ("The folder is not empty.", "Give another one, or move away what is in it."),
    errno.EACCES: ("You may not read or write there.", "Give another place, or change its permissions (chmod, chown)."),
    errno.EPERM: ("The system does not allow it.", "Give another place, or change its owner (chown)."),
    errno.EROFS: ("The disk can be read only.", "Give a place on another disk."),
    errno.ENOSPC: ("The disk is full.", "Free some space, or give a place on another disk."),
    errno.EDQUOT: ("Your share of the disk is full.", "Free some space, or give a place on another disk."),
    errno.EFBIG: ("The file would be larger than this disk or account allows.", "Give a place on another disk."),
    errno.ENAMETOOLONG: ("The name is longer than the system allows.", "Give a shorter one."),
    errno.ELOOP: ("Links lead in a circle.", "Remove the link, or name what it should lead to."),
    errno.EBUSY: ("Something else uses it.", "Close what uses it, or give another place."),
    errno.EXDEV: ("Its two ends lie on different disks.", "Give a place on the disk of the output."),
    errno.EMFILE: ("Too many files are open.", "Raise the limit: ulimit -n 4096."),
    errno.EIO: ("The disk could not read or write it.", "Look at the system's log (dmesg); use another disk."),
    errno.ESTALE: ("The network disk no longer knows it.", "Mount it again, and run the same line."),
    errno.EINVAL: ("The name cannot be one.", "Give another one."),
}  # fmt: skip
"""What a path given by a user may lead to, as opposed to a bug."""


def is_refusal(error: OSError) -> bool:
    """Whether the system spoke of a path, or of the room on its disk; else the error is a bug."""
    return error.errno in _REASONS and (error.filename is not None or error.errno in _WITHOUT_NAME)


def refusal(error: OSError) -> InputError:
    """The error for people."""
    why, fix = _REASONS.get(error.errno or 0, (error.strerror or str(error), "Check the path."))
    name = error.filename
    named = isinstance(name, (str, bytes, os.PathLike))
    if error.errno == errno.EEXIST and named and Path(os.fsdecode(name)).is_file():
        why = "It is a file, and a folder is needed."
    return InputError(f"{_told(os.fsdecode(name))} cannot be used" if named else "A file cannot be written", why, fix)


def unread(error: BaseException, otherwise: InputError) -> InputError:
    """The error for what could not be read: what the system says of it, or that it is not UTF-8, or `otherwise`."""
    if isinstance(error, OSError) and error.errno in _OF_ACCESS and error.filename is not None:
        told = refusal(error)
        return InputError(f"{_told(os.fsdecode(error.filename))} cannot be read", told.why, told.fix)
    if isinstance(error, UnicodeDecodeError):
        why = f"It is not UTF-8: byte {error.object[error.start]:#04x} is part of no letter there."
        return InputError(otherwise.what, why, "Write it anew as UTF-8 (iconv -f ENCODING -t UTF-8), or leave it out.")
    return otherwise


_OF_ACCESS = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.EIO, errno.ESTALE)
"""What says nothing of a file's content."""
_WITHOUT_NAME = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE)
"""What a write says, which no longer knows the name of its file."""


_UNFINISHED = re.compile(r"(^|/)\.([^/]+)\.(partial|old|tmp)-[0-9a-f]+-[0-9a-f]+(?=/|$)")
"""What is written lies beside its place until it is whole (staging.beside); people know the place."""


def _told(path: str) -> str:
    """A path as a user knows it, short enough for a message."""
    path = _UNFINISHED.sub(r"\1\2", path)
    return path if len(path) <= 200 else f"{path[:90]} ... {path[-90:]}"
