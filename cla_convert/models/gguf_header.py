"""The header of a GGUF file: metadata and the shapes of its tensors. Imports no torch.

Read here because the readers of gguf and transformers build an object for every entry of the vocabulary, which takes
half a minute where it has 262k (Gemma 3), and `inspect` only wants to know what the file is.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST = 1024
"""Arrays that are longer are vocabularies; they are passed over."""
_LONGEST_TEXT = 1 << 24
"""Bytes of a name or chat template at most; more is a damaged length, and would be reserved in memory."""

_MODEL_TYPES = {"gemma3": "gemma3_text", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss"}
"""Architecture -> `model_type` of transformers, where they differ."""
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_MORE_SIZES = {
    "llama": {"rope.dimension_count": "head_dim"},
    "phi3": {"attention.sliding_window": "sliding_window"},
    "gemma2": {"attention.key_length": "head_dim", "attention.sliding_window": "sliding_window"},
    "gemma3": {"attention.key_length": "head_dim", "attention.sliding_window": "sliding_window"},
    "qwen3moe": {"attention.key_length": "head_dim"},
}
"""What else tells an architecture's attention; of the others the rest follows from these or from defaults."""


class Place(NamedTuple):
    """Where a tensor lies."""

    type: int
    """Number of its type: F32, Q4_K, ..."""
    start: int
    """Byte of the file where it begins."""


class Header(NamedTuple):
    """What stands before the weights."""

    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    """Tensor name (as in GGUF) -> shape, outermost dimension first."""
    places: dict[str, Place]

    def config(self) -> dict[str, Any]:
        """The part of a config.json that tells a model's family and attention, as transformers derives it."""
        architecture = str(self.metadata["general.architecture"])
        names = _SIZES | _MORE_SIZES.get(architecture, {})
        sizes = {ours: self.metadata.get(f"{architecture}.{name}") for name, ours in names.items()}
        known = {key: value for key, value in sizes.items() if value not in (None, 0)}
        if "num_attention_heads" in known:  # multi-head attention: the file need not say it twice
            known.setdefault("num_key_value_heads", known["num_attention_heads"])
        return {"model_type": _MODEL_TYPES.get(architecture, architecture)} | known


def read_gguf_header(path: Path) -> Header:
    """Read the header. Raises ValueError, KeyError or struct.error for a file that is not whole or not GGUF."""
    with path.open("rb") as file:
        magic, version = file.read(4), _number(file, "I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it does not begin as a GGUF file of version 2 or 3 does")
        tensors, entries = _number(file, "Q"), _number(file, "Q")
        metadata = {_string(file): _value(file, _number(file, "I")) for _ in range(entries)}
        found = [_tensor(file) for _ in range(tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-file.tell() // alignment) * alignment
    shapes = {name: shape for name, shape, _, _ in found}
    return Header(metadata, shapes, {name: Place(kind, start + offset) for name, _, kind, offset in found})


def _number(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]


def _string(file: BinaryIO) -> str:
    length = _number(file, "Q")
    if length > _LONGEST_TEXT:
        raise ValueError(f"a text in the header claims {length} bytes")
    return file.read(length).decode("utf-8", errors="replace")


def _value(file: BinaryIO, kind: int) -> Any:
    """A metadata value; None in place of a long array."""
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _number(file, _NUMBERS[kind])
    kind, length = _number(file, "I"), _number(file, "Q")
    if length <= _LONGEST:
        return [_value(file, kind) for _ in range(length)]
    if kind != _STRING:
        file.seek(length * struct.calcsize(f"<{_NUMBERS[kind]}"), 1)
        return None
    for _ in range(length):
        file.seek(_number(file, "Q"), 1)
    return None


def _tensor(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = _string(file), _number(file, "I")
    if dimensions > 4:
        raise ValueError(f"the tensor {name[:100]!r} claims {dimensions} dimensions")
    shape = [_number(file, "Q") for _ in range(dimensions)]
    kind, offset = _number(file, "I"), _number(file, "Q")
    return name, tuple(reversed(shape)), kind, offset
