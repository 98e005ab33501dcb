"""A checkpoint folder, read lazily: names, shapes and dtypes from the headers, tensors one at a time. Imports no torch.

Headers are parsed here (8 bytes of length, JSON; https://huggingface.co/docs/safetensors) because a plan must know a
model of any size without loading it and must name what is wrong with a broken file. Tensors are read from their place
in the file and not through a map of it, whose pages would count as memory for as long as it is open.
"""

import hashlib
import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .families import FAMILIES, Family
from .shape import shape_of

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
ELEMENT_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
FLOATING = {code: name for code, name in TORCH_NAMES.items() if "float" in name}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".py"}
_TEMPLATES = "additional_chat_templates"
"""Where transformers keeps the chat templates but for the first."""
_REWRITTEN = {"config.json", "README.md", INDEX, "pytorch_model.bin.index.json", "cla_manifest.json", "cla_source.json"}


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


@dataclass
class Checkpoint:
    """A model folder with config.json and safetensors weights (single or sharded).

    A projection that a family stores fused is shown as q_proj, k_proj and v_proj, so that nobody else knows of it.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path, *, as_stored: bool = False) -> "Checkpoint":
        """Read config.json, the index and all headers. Raises InputError naming the file that is missing or broken.

        Args:
            folder: in Hugging Face format.
            as_stored: show fused projections as they are.
        """
        config = _read_json(folder / "config.json")
        tensors: dict[str, TensorInfo] = {}
        for file, promised in _weight_files(folder).items():
            header = read_header(folder / file)
            if missing := promised - header.keys():
                raise InputError(
                    f"{file} lacks {len(missing)} tensors that the index promises, such as {sorted(missing)[0]!r}",
                    why="The index and the shards do not belong together.",
                    fix="Download the model again.",
                )
            tensors |= {name: header[name] for name in (promised or header)}
        return cls(folder, config, tensors) if as_stored else cls.of(folder, config, tensors)

    @classmethod
    def of(cls, folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> "Checkpoint":
        """From the tensors as they are stored. Raises InputError for types that cannot be read."""
        if unknown := {info.dtype for info in tensors.values()} - ELEMENT_SIZE.keys():
            raise InputError(
                f"{folder} holds {', '.join(sorted(unknown))} tensors",
                why="Weights quantised to these types cannot be pooled.",
                fix="Use the unquantised checkpoint of this model.",
            )
        family = FAMILIES.get(str(config.get("model_type")))
        if family and family.fused and "quantization_config" not in config:  # packed rows are others
            tensors = _split_fused(tensors, family, config)
        return cls(folder, config, tensors)

    def read(self, name: str) -> "Tensor":
        """Load one tensor (a copy on the CPU)."""
        import torch

        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=getattr(torch, TORCH_NAMES[info.dtype]))
        with (self.folder / info.file).open("rb") as file:
            file.seek(info.start)
            found = file.readinto(bytes_of(tensor))
        assert found == info.nbytes, f"{info.file} became shorter while it was read"
        return tensor

    @property
    def positions(self) -> int | None:
        """Positions that the model knows, if there is a limit."""
        return self.config.get("max_position_embeddings") or self.config.get("n_positions")

    @property
    def sidecars(self) -> list[Path]:
        """Files that travel with the model byte for byte: tokenizer, chat template, generation config, licence."""
        files = [file for file in self.folder.iterdir() if file.is_file() and not file.name.startswith(".")]
        files += self.folder.glob(f"{_TEMPLATES}/*.jinja")
        return sorted(f for f in files if f.suffix not in _WEIGHTS and f.name not in _REWRITTEN)

    def copy_sidecars(self, out: Path, *, without: Collection[str] = ()) -> None:
        """Copy them into `out`, but for those named."""
        for file in self.sidecars:
            if file.name not in without:
                copy = out / file.relative_to(self.folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)

    @property
    def origin(self) -> dict[str, Any]:
        """What `source.py` recorded about where the folder came from (GGUF type, licence, hub id), if anything."""
        path = self.folder / "cla_source.json"
        return _read_json(path) if path.exists() else {}

    def fingerprint(self) -> str:
        """sha256 over config, headers and 4 KiB samples of every weight file: fast at any size."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        for file in sorted({info.file for info in self.tensors.values()}):
            digest.update(_samples(self.folder / file))
        return digest.hexdigest()


def bytes_of(tensor: "Tensor") -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of a safetensors file. Raises InputError if it is truncated or not safetensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        infos = {
            name: TensorInfo(path.name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        }
        for name, info in infos.items():
            first, last = header[name]["data_offsets"]
            if first < 0 or (info.dtype in ELEMENT_SIZE and last - first != info.nbytes):
                raise ValueError(f"{name} does not have the bytes that its shape needs")
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size:
            raise ValueError(f"its header describes {end} bytes, the file has {size}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a whole safetensors file", why=f"{error}.", fix="Download or copy the file again."
        ) from error
    return infos


def _split_fused(tensors: dict[str, TensorInfo], family: Family, config: dict[str, Any]) -> dict[str, TensorInfo]:
    """Replace every fused projection by its blocks of rows: q, then k, then v. Raises InputError if they do not fit."""
    rows = shape_of(config).projection_rows
    split: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        place = family.place(name)
        if place is None or place.module != family.fused:
            split[name] = info
            continue
        if info.shape[0] != sum(rows.values()):
            raise InputError(
                f"{name} has {info.shape[0]} rows where config.json promises {sum(rows.values())}",
                why=f"It should hold {', '.join(f'{count} of {module}' for module, count in rows.items())}.",
                fix="Check that config.json belongs to the weights.",
            )
        for (module, count), end in zip(rows.items(), accumulate(rows.values()), strict=True):
            first = info.start + (end - count) * (info.nbytes // info.shape[0])
            block = replace(info, shape=(count, *info.shape[1:]), start=first)
            split[family.tensor(place.layer, module, place.part)] = block
    return split


def _weight_files(folder: Path) -> dict[str, set[str]]:
    """File name -> tensors the index promises in it (empty for a single file: all it has)."""
    if (folder / INDEX).exists():
        files: dict[str, set[str]] = {}
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{folder / INDEX} has no weight_map", fix="Download the model again.")
        for name, file in weight_map.items():
            files.setdefault(str(file), set()).add(name)
        for file in files:
            _refuse_outside(folder, file)
        return files
    if (folder / "model.safetensors").exists():
        return {"model.safetensors": set()}
    raise InputError(
        f"{folder} has no safetensors weights",
        why=f"It has neither model.safetensors nor {INDEX}.",
        fix="Give a folder in Hugging Face format, a .gguf file or a hub id.",
    )


def _refuse_outside(folder: Path, file: str) -> None:
    if Path(file).name != file or file in (".", ".."):
        raise InputError(
            f"The index of {folder} names {file!r}, which is outside the folder",
            why="A checkpoint must not reach other files of this machine.",
            fix="Do not use this checkpoint, or mend its index.",
        )
    if not (folder / file).is_file():
        raise InputError(
            f"{folder / file} is missing", why="The index names it.", fix="Download the model again, with all shards."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist", fix="Give a model folder in Hugging Face format.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read", why=str(error)) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return value


def _samples(path: Path, count: int = 64) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        parts = [str(size).encode()]
        for i in range(count):
            file.seek(size * i // count)
            parts.append(file.read(4096))
    return b"".join(parts)
