"""Whether the numbers of a file are finite, told from their bytes, a block at a time. Imports no torch.

A float of any width is NaN or infinite where all bits of its exponent are set. Without the sign, which is shifted out,
these are the largest of all whole numbers of that width.
"""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from io import FileIO
from typing import TYPE_CHECKING

import numpy as np

from ..console import progress
from ..errors import InputError, NotFiniteError
from .headers import FLOATING, TensorInfo

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

_BLOCK = 1 << 18
"""Bytes looked at a time: what stays in a processor's cache."""
_EXPONENTS = {"BF16": 8, "F16": 5, "F32": 8, "F64": 11}
"""Bits of the exponent of each type that is looked at; the others hold no infinity, or are refused as packed."""
assert _EXPONENTS.keys() == FLOATING.keys()


def finite_rest(file: FileIO, dtype: str, count: int, seen: Callable[[memoryview], None] | None = None) -> bool:
    """Whether `count` bytes from where an unbuffered file stands are finite numbers; it stands behind them then.

    `dtype` is safetensors' name of their type; `seen` is given the bytes, a block at a time.
    """
    if dtype not in _EXPONENTS and not seen:
        file.seek(count, os.SEEK_CUR)
        return True
    block = memoryview(bytearray(min(count, _BLOCK)))
    while count:
        part = block[: min(count, _BLOCK)]
        filled = 0
        while filled < len(part):
            found = file.readinto(part[filled:])
            assert found, f"{file.name} became shorter while it was read"
            filled += found
        count -= len(part)
        if seen:
            seen(part)
        if not _is_finite(part, dtype):
            return False
    return True


@contextmanager
def naming_not_finite(checkpoint: "Checkpoint", unused: Collection[str]) -> Iterator[None]:
    """What stumbles over NaN is seldom where it is from: then, and only then, all of a source is read but `unused`.

    Raises InputError if its weights are not finite; else what was raised.
    """
    try:
        yield
    except (NotFiniteError, ValueError, RuntimeError) as error:  # of SciPy and of torch: matrices that have no roots
        other = isinstance(error, RuntimeError) and type(error).__name__ != "_LinAlgError"  # such as too little memory
        if other or not (names := _not_finite(checkpoint, unused)):
            raise
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(
            f"The weights in {checkpoint.folder} are not finite",
            why=f"NaN or infinity is in {', '.join(names[:3])}{more}. No output can be right that is made of them.",
            fix="Download the model again, or mend it: its own training may have diverged, or it was saved in float16.",
        ) from error


def _not_finite(checkpoint: "Checkpoint", unused: Collection[str]) -> list[str]:
    """Names, as they are stored, of all tensors of a checkpoint that hold NaN or infinity; reads every file."""
    looked_at = {n: info for n, info in (checkpoint.whole or checkpoint.tensors).items() if n not in unused}
    found = []
    with progress(len(looked_at), "looking for NaN", unit="tensor", leave=False) as bar:
        for name, info in checkpoint.as_stored(looked_at).items():
            with (checkpoint.folder / info.file).open("rb", buffering=0) as file:
                file.seek(info.start)
                if not finite_rest(file, info.dtype, info.nbytes):
                    found.append(name)
            bar.update()
    return sorted(found)


def _is_finite(block: memoryview, dtype: str) -> bool:
    if dtype not in _EXPONENTS or not block:
        return True
    width = 8 * TensorInfo("", dtype, (1,)).nbytes
    numbers = np.frombuffer(block, f"<u{width // 8}")
    exponent = ((1 << _EXPONENTS[dtype]) - 1) << (width - _EXPONENTS[dtype])
    return int((numbers << 1).max()) < exponent
