"""Writing a model folder: tensors stream into shards, and the folder appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..files import sync, write_json
from .checkpoint import INDEX

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "cla_manifest.json"


class ShardWriter:
    """Collects tensors into safetensors shards of at most `max_shard_size` bytes; holds one shard in memory."""

    def __init__(self, folder: Path, max_shard_size: int) -> None:
        self.folder, self.max_shard_size = folder, max_shard_size
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: "Tensor") -> None:
        """Append a tensor; writes a shard whenever one is full. Raises InputError if the disk is full."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_size:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def finish(self) -> None:
        """Write the last shard, give shards their final names and write the index if there are several."""
        self._flush()
        if len(self._shards) == 1:
            self._shards[0][0].rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for number, (path, names) in enumerate(self._shards, 1):
            final = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            path.rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / INDEX, index)

    def _flush(self) -> None:
        if not self._pending:
            return
        from safetensors.torch import save_file

        path = self.folder / f"shard-{len(self._shards)}.partial"
        with disk_full_is_an_input_error(self.folder):
            save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors writes 0600, which a serving user could not read
        self._shards.append((path, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0


@contextmanager
def publishing(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty staging folder beside `out`; on success it is synced and renamed to `out`, on failure removed.

    Raises:
        InputError: `out` exists with content and `overwrite` is off, or it is not a folder that this tool wrote.
    """
    out = out.absolute()
    check_output(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(out)
    staging = out.with_name(f".{out.name}.partial-{os.getpid()}")
    staging.mkdir()
    try:
        yield staging
        for file in staging.rglob("*"):
            sync(file)
        _swap(staging, out)
        sync(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that must not be replaced. Raises InputError."""
    if out.is_file():
        raise InputError(f"{out} is a file", fix="Give a folder for the output.")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{out} is not empty", fix="Give another folder, or --overwrite to replace it.")
    if not (out / MANIFEST).exists():
        raise InputError(
            f"{out} will not be replaced",
            why=f"It has no {MANIFEST}, so it was not written by cla-convert.",
            fix="Give another folder, or remove this one yourself.",
        )


def check_disk(folder: Path, needed: int) -> None:
    """Raise InputError if the disk under `folder` has fewer than `needed` bytes free."""
    from ..console import human_bytes

    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"The disk of {folder} is too small",
            why=f"The output needs {human_bytes(needed)}, {human_bytes(free)} are free.",
            fix="Free some space or give an output folder on another disk. Nothing was written.",
        )


@contextmanager
def disk_full_is_an_input_error(folder: Path) -> Iterator[None]:
    """Turn "no space left on device" into an InputError."""
    try:
        yield
    except Exception as error:  # safetensors wraps the OSError in an exception type of its own
        if "No space left" in str(error) or "os error 28" in str(error):
            raise InputError(
                f"The disk of {folder} is full", why=str(error), fix="Free some space and run again."
            ) from error
        raise


def _swap(staging: Path, out: Path) -> None:
    """Rename staging to out; an old out is kept aside until the new one stands."""
    if not out.exists():
        staging.rename(out)
        return
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    out.rename(old)
    try:
        staging.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)


def _remove_stale(out: Path) -> None:
    """Clean up after processes that were killed: drop their staging folders, put back what they had moved aside."""
    import psutil

    for folder in out.parent.glob(f".{out.name}.*-*"):
        _, kind, pid = folder.name.rsplit(".", 1)[0], *folder.name.rsplit(".", 1)[1].split("-", 1)
        # In a container the next process often has the same number as the one that was killed.
        if not pid.isdigit() or (int(pid) != os.getpid() and psutil.pid_exists(int(pid))):
            continue
        if kind == "old" and not out.exists():
            folder.rename(out)
        elif kind in ("old", "partial"):
            shutil.rmtree(folder, ignore_errors=True)
