"""Writing a model folder: tensors stream into shards, and the folder appears whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, NotFiniteError
from ..files import check_place, existing, read_json, write_json
from ..staging import claimed, staged
from .checkpoint import INDEX, Checkpoint, bytes_of
from .finite import finite_rest
from .headers import ELEMENT_SIZE, TORCH_NAMES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "cla_manifest.json"
_FOLDERS = ("additional_chat_templates", "__pycache__", ".cache")
"""What an output may hold: with what Python and the hub's library leave in it."""
_PAGE = 4096
_CHUNK = 1 << 23
"""Bytes copied at a time: they are looked at before the system's cache has dropped them."""


class ShardWriter:
    """Writes tensors to their places in safetensors shards of at most `max_shard_size` bytes; holds none of them.

    What will be written is known beforehand, from the headers of a source, so the shards are laid out first. Then
    tensors may come in any order.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], max_shard_size: int) -> None:
        """Write the headers of all shards, and the index if there are several. Raises InputError if the disk is full.

        Args:
            folder: where the shards go.
            tensors: dtype and shape of each tensor; where they lie now does not matter.
            max_shard_size: bytes of tensors in a shard at most; a larger tensor gets a shard of its own.
        """
        self._folder, self._tensors, self._places = folder, tensors, dict[str, tuple[str, int]]()
        self._missing = set(tensors)
        shards = _shards(tensors, max_shard_size)
        for number, names in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out("model.safetensors" if len(shards) == 1 else name, names)
        if len(shards) > 1:
            weight_map = {name: file for name, (file, _) in sorted(self._places.items())}
            total = sum(info.nbytes for info in tensors.values())
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def add(self, name: str, tensor: "Tensor") -> None:
        """Write a tensor. Raises InputError if the disk is full, or the tensor is not finite."""
        info = self._tensors[name]
        kind = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        assert kind == (TORCH_NAMES[info.dtype], info.shape), f"{name} is {kind}, {info} was announced"
        _refuse_infinite(name, tensor)
        with self._at(name) as file:
            _write_all(file, bytes_of(tensor.cpu().contiguous()))

    def copy(self, name: str, source: Path, start: int, *, look: bool = True) -> None:
        """Write a tensor that lies in the file `source` from byte `start` on, as it is.

        Raises InputError likewise; of a tensor that nobody is to look at, only if the disk is full.
        """
        info = self._tensors[name]
        with source.open("rb", buffering=0) as reader, self._at(name) as file:
            reader.seek(start)
            if not _copy_finite(reader, file, info.dtype if look else "", info.nbytes):
                raise NotFiniteError(
                    f"{name} holds NaN or infinity",
                    why=f"It does in {source}, from where it is copied as it is.",
                    fix="Download the model again, or mend it.",
                )

    def copy_others(self, source: Checkpoint, *, look: bool = True) -> None:
        """Write what stands around the language model of a checkpoint, as it is. Raises InputError likewise."""
        for name, info in source.others.items():
            self.copy(name, source.folder / info.file, info.start, look=look)

    def finish(self) -> None:
        """Check that nothing is missing."""
        assert not self._missing, f"{len(self._missing)} tensors were not written, such as {min(self._missing)}"

    def _lay_out(self, file: str, names: list[str]) -> None:
        """Write a shard's header and reserve its size. Wide elements come first, so that all are aligned.

        The header is padded so that tensors lie in their pages as they do in the source: such copies take less time.
        """
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name in sorted(names, key=lambda name: -ELEMENT_SIZE[self._tensors[name].dtype]):
            info = self._tensors[name]
            offsets[name], end = end, end + info.nbytes
            header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [offsets[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        start = self._tensors[names[0]].start if names else 0
        text += b" " * ((start - start % 8 - 8 - len(text)) % _PAGE)
        self._places |= {name: (file, 8 + len(text) + offset) for name, offset in offsets.items()}
        with disk_full_is_an_input_error(self._folder), (self._folder / file).open("wb") as shard:
            shard.write(len(text).to_bytes(8, "little") + text)
            shard.truncate(8 + len(text) + end)

    @contextmanager
    def _at(self, name: str) -> Iterator[FileIO]:
        """The shard, open for writing where the tensor belongs."""
        file, offset = self._places[name]
        with disk_full_is_an_input_error(self._folder), (self._folder / file).open("r+b", buffering=0) as shard:
            shard.seek(offset)
            yield shard
        self._missing.remove(name)


def _copy_finite(reader: FileIO, writer: FileIO, dtype: str, count: int) -> bool:
    """Copy from where one file stands to where the other does; whether they are finite numbers: if not, not all."""
    with suppress(AttributeError, OSError):  # not Linux
        os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    while count:
        part = min(count, _CHUNK)
        done = _copy_in_the_kernel(reader, writer, part)
        reader.seek(-done, os.SEEK_CUR)
        rest = finite_rest(reader, dtype, done) and finite_rest(
            reader, dtype, part - done, lambda block: _write_all(writer, block)
        )
        if not rest:
            return False
        count -= part
    return True


def _copy_in_the_kernel(reader: FileIO, writer: FileIO, count: int) -> int:
    """As cp does, where that works: how many bytes were copied, in whole numbers of any type."""
    done = 0
    with suppress(AttributeError, OSError):  # not Linux, or two file systems that do not know each other
        while done < count and (found := os.copy_file_range(reader.fileno(), writer.fileno(), count - done)):
            done += found
    begun = done % 8 if done < count else 0
    reader.seek(-begun, os.SEEK_CUR)
    writer.seek(-begun, os.SEEK_CUR)
    return done - begun


def _write_all(file: FileIO, data: memoryview) -> None:
    """Unbuffered files write as much as they like: on Linux 2 GiB at most."""
    while data:
        data = data[file.write(data) :]


def _refuse_infinite(name: str, tensor: "Tensor") -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if not all(end.isfinite() for end in tensor.aminmax()):  # NaN wins; needs no memory
        raise NotFiniteError(
            f"{name} is not finite in {str(tensor.dtype).removeprefix('torch.')}",
            why="It was not before, or its values are larger than this dtype can hold.",
            fix="Ask for another dtype (--dtype bfloat16 or float32; source.dtype), or check the source's weights.",
        )


def infos_of(state: "Mapping[str, Tensor]") -> dict[str, TensorInfo]:
    """Dtypes and shapes of tensors in memory, for a `ShardWriter`."""
    codes = {name: code for code, name in TORCH_NAMES.items()}
    return {
        name: TensorInfo("", codes[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in state.items()
    }


def _shards(tensors: Mapping[str, TensorInfo], max_shard_size: int) -> list[list[str]]:
    """Names of each shard: filled in order, at least one."""
    shards, size = [[]], 0
    for name, info in tensors.items():
        if shards[-1] and size + info.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    return shards


@contextmanager
def publishing(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty staging folder beside `out`; on success it is synced and renamed to `out`, on failure removed.

    Raises:
        InputError: `out` exists with content and `overwrite` is off, it is not a folder that this tool wrote, or
            another process is writing it.
    """
    out = out.resolve()  # of a link, what it points to is replaced, on the disk where that lies
    check_place(out)

    def free() -> bool:
        check_output(out, overwrite=overwrite)
        return True

    with claimed(out):
        free()
        with staged(out, wanted=free) as staging:
            yield staging


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that cannot be made or must not be replaced. Raises InputError."""
    check_place(out)
    if Path.cwd().is_relative_to(out.resolve()):
        raise InputError(
            f"{out} is the folder that you are in, or above it",
            why="An output takes the place of its folder as a whole; you would be left in one that is gone.",
            fix="Name a new folder in it.",
        )
    try:
        if not any(out.iterdir()):
            return
    except FileNotFoundError:
        return
    ours = (out / MANIFEST).exists()
    if not overwrite:
        instead = ", or --overwrite to replace it" if ours else ""
        raise InputError(f"{out} is not empty", fix=f"Give another folder{instead}.")
    if not ours:
        raise InputError(
            f"{out} will not be replaced",
            why=f"It has no {MANIFEST}, so it was not written by cla-convert.",
            fix="Give another folder, or remove this one yourself.",
        )
    if foreign := sorted(path for path in out.iterdir() if path.is_dir() and path.name not in _FOLDERS):
        raise InputError(
            f"{out} will not be replaced",
            why=f"{foreign[0]} lies in it, which is not of cla-convert and would be lost.",
            fix="Move it, or give another folder.",
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """cla_manifest.json of an output folder; empty for other folders. Raises InputError if it is damaged."""
    return read_json(folder / MANIFEST) or {}


def check_disk(folder: Path, needed: int, what: str = "The output needs") -> None:
    """Raise InputError if the disk under `folder` takes no files, or has fewer than `needed` bytes free, for `what`."""
    from ..console import human_bytes

    folder = existing(folder)
    usage = shutil.disk_usage(folder)
    free = usage.free
    if os.statvfs(folder).f_flag & os.ST_RDONLY or not (free or usage.total):
        raise InputError(
            f"Nothing can be written below {folder}",
            why="Its disk can be read only." if usage.total else "It is a view of the system, and holds no files.",
            fix="Give a folder on another disk.",
        )
    if free < needed:
        raise InputError(
            f"The disk of {folder} is too small",
            why=f"{what} {human_bytes(needed)}, {human_bytes(free)} are free.",
            fix="Free some space or give an output folder on another disk. The work has not begun.",
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
