"""Fingerprint of a model folder, cheap enough to take before every evaluation: has the model changed?"""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

SLICE = 1024
"""Bytes read at the start, the middle and the end of every tensor."""

_TEXT = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "*.index.json", "*.py")
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "tokenizer.model")


def model_fingerprint(folder: Path) -> str:
    """sha256 over config, tokenizer and code files in full, and over sizes, headers and samples of the weights.

    Three slices of every tensor are read, so retraining or another pooling of a few layers changes the fingerprint,
    while a checkpoint of 100 GB still takes well under a second.
    """
    digest = hashlib.sha256()
    for path in _matching(folder, _TEXT):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    for path in _matching(folder, _WEIGHTS):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        for piece in _samples(path):
            digest.update(piece)
    return digest.hexdigest()


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _samples(path: Path) -> Iterator[bytes]:
    """The safetensors header and slices of every tensor; of any other file, slices of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        spans = [(0, size)]
        if path.suffix == ".safetensors" and size > 8:
            # Layout: 8 bytes little-endian header length, JSON header with `data_offsets`, data.
            (length,) = struct.unpack("<Q", file.read(8))
            header = file.read(min(length, size))
            yield header
            spans = [(8 + length + start, 8 + length + end) for start, end in _offsets(header)]
        for start, end in spans:
            for position in {start, (start + end) // 2, max(start, end - SLICE)}:
                file.seek(position)
                yield file.read(min(SLICE, end - position))


def _offsets(header: bytes) -> list[tuple[int, int]]:
    try:
        entries = json.loads(header)
        return sorted(tuple(entry["data_offsets"]) for name, entry in entries.items() if name != "__metadata__")
    except (ValueError, KeyError, AttributeError, TypeError):
        return []  # a corrupt file has a fingerprint too; loading it says what is wrong
