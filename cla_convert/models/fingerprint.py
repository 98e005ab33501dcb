"""The identity of a model folder: a hash over every byte that says what the model is. Imports no torch.

Sampling would be quicker and wrong: two conversions of one map differ only in the tensors that were pooled. All bytes
are read once, on several threads (hashing releases the interpreter's lock), and the hash of a large file is kept under
its place, size and times, so that the next stage of a run and the next run find it.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..environment import cache_of
from ..files import read_kept
from ..kept import note

_CONTENT = (
    "config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "*.tiktoken", "tekken*.json", "*.model", "*.jinja", "additional_chat_templates/*.jinja", "*.index.json", "*.py",
    "*.safetensors", "*.bin", "*.gguf",
)  # fmt: skip
_BLOCK = 1 << 26
"""Bytes that one thread hashes."""
_READ = 1 << 20
_WORTH_KEEPING = 1 << 26
"""Bytes of the smallest file whose hash is kept: smaller ones take less time to hash than to look up."""
_FORMAT = "2"


def fingerprint(folder: Path) -> str:
    """sha256 over names and contents of the configuration, tokenizer, template, code and weight files in a folder.

    Cards, licences and records are left out: they say nothing about what the model computes.
    """
    digest = hashlib.sha256(_FORMAT.encode())
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as threads:
        for path in sorted({path for pattern in _CONTENT for path in folder.glob(pattern) if path.is_file()}):
            digest.update(f"{path.relative_to(folder)}\0{_hash_of(path, threads)}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _hash_of(path: Path, threads: ThreadPoolExecutor) -> str:
    """The hash of a file; of a large one, from the cache if the file is still as it was."""
    state = path.stat()
    if state.st_size < _WORTH_KEEPING:
        return _all_bytes(path, state.st_size, threads)
    key = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"
    kept = cache_of("fingerprints") / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.json"
    if (found := read_kept(kept)) and "sha256" in found:
        return str(found["sha256"])
    made = _all_bytes(path, state.st_size, threads)
    note(kept, {"sha256": made})
    return made


def _all_bytes(path: Path, size: int, threads: ThreadPoolExecutor) -> str:
    """The hash of the hashes of a file's blocks."""
    blocks = threads.map(lambda start: _block(path, start), range(0, size, _BLOCK))
    return hashlib.sha256(b"".join([str(size).encode(), *blocks])).hexdigest()


def _block(path: Path, start: int) -> bytes:
    digest, left = hashlib.sha256(), _BLOCK
    for piece in _pieces(path, start):
        digest.update(piece[:left])
        if (left := left - len(piece)) <= 0:
            break
    return digest.digest()


def _pieces(path: Path, start: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(_READ))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(buffer):
            yield buffer[:count]
