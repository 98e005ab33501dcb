"""Headers of safetensors files: names, shapes and dtypes of tensors, and where they lie. Imports no torch.

Parsed here (8 bytes of length, JSON; https://huggingface.co/docs/safetensors) because a plan must know a model of any
size without loading it and must name what is wrong with a broken file.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import refuse_pointer
from ..refusals import unread

ELEMENT_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
FLOATING = {code: name for code, name in TORCH_NAMES.items() if "float" in name}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    file: str
    dtype: str
    """safetensors' name: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int = 0
    """Byte of the file where it begins."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * ELEMENT_SIZE[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of a safetensors file. Raises InputError if it is truncated or not safetensors."""
    refuse_pointer(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        infos = {name: _info(path.name, name, entry, 8 + length) for name, entry in header.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size:
            raise ValueError(f"its header describes {end} bytes, the file has {size}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        cut = InputError(f"{path} is not a whole safetensors file", f"{error}.", "Download or copy the file again.")
        raise unread(error, cut) from error
    return infos


def _info(file: str, name: str, entry: dict[str, Any], data: int) -> TensorInfo:
    """What a header says of a tensor, where the data begin at byte `data`. Raises ValueError for what cannot be."""
    (first, last), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    counts = [first, last, *shape]
    if not isinstance(dtype, str) or not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise ValueError(f"the type, shape or place of {name!r} is none: {dtype!r}, {shape!r}, {[first, last]!r}"[:300])
    info = TensorInfo(file, dtype, tuple(shape), data + first)
    if dtype in ELEMENT_SIZE and last - first != info.nbytes:
        raise ValueError(f"{name} does not have the bytes that its shape needs")
    return info
