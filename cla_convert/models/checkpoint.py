"""A checkpoint folder, read lazily: names, shapes and dtypes from the headers, tensors one at a time. Imports no torch.

Tensors are read from their place in the file and not through a map of it, whose pages would count as memory for as long
as it is open.
"""

import shlex
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import load_json, read_json, refuse_pointer, stays_in
from ..refusals import unread
from .config_numbers import refuse_numbers
from .families import FAMILIES, Family, as_transformers_reads, without_strays
from .headers import ELEMENT_SIZE, FLOATING, TORCH_NAMES, TensorInfo, read_header
from .shape import positions_of, shape_of
from .whole import Around, around, text_config, whole_of

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
_SMALL = (
    "config.json", INDEX, "generation_config.json", "tokenizer_config.json", "tokenizer.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""What transformers reads of a model folder as JSON objects."""
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".py"}
_TEMPLATES = "additional_chat_templates"
"""Where transformers keeps the chat templates but for the first."""
_REWRITTEN = {"config.json", "README.md", INDEX, "pytorch_model.bin.index.json", "cla_manifest.json", "cla_source.json"}


@dataclass
class Checkpoint:
    """A model folder with config.json and safetensors weights (single or sharded).

    A projection that a family stores fused is shown as q_proj, k_proj and v_proj, so that nobody else knows of it.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    whole: dict[str, TensorInfo] = field(default_factory=dict)
    """The same with fused projections as they are stored, for a family that has them."""
    around: Around | None = None
    """Of a model that also sees images, what stands around the language model, which is all that is shown else."""
    others: dict[str, TensorInfo] = field(default_factory=dict)
    """Tensors around the language model, by their names in the files."""
    strays: list[str] = field(default_factory=list)
    """Keys of the file that `config` is without (`without_strays`)."""

    @classmethod
    def open(cls, folder: Path, *, as_stored: bool = False) -> "Checkpoint":
        """Read config.json, the index and all headers. Raises InputError naming the file that is missing or broken.

        What is read is what transformers loads: of two sets of weights model.safetensors, of shards all that they hold.

        Args:
            folder: in Hugging Face format.
            as_stored: show fused projections as they are.
        """
        refuse_adapter(folder)
        config = as_transformers_reads(load_json(folder / "config.json"))
        tensors: dict[str, TensorInfo] = {}
        for file, promised in _weight_files(folder).items():
            header = read_header(folder / file)
            if missing := promised - header.keys():
                raise InputError(
                    f"{file} lacks {len(missing)} tensors that the index promises, such as {sorted(missing)[0]!r}",
                    why="The index and the shards do not belong together.",
                    fix="Download the model again.",
                )
            if twice := tensors.keys() & header.keys():
                raise InputError(
                    f"{file} and {tensors[min(twice)].file} both hold {min(twice)!r}",
                    why="Nobody can say which of them belongs to the model.",
                    fix="Remove the shards of another model, or download the model again.",
                )
            tensors |= header
        return cls.of(folder, config, tensors, as_stored=as_stored)

    @classmethod
    def of(
        cls, folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo], *, as_stored: bool = False
    ) -> "Checkpoint":
        """From the tensors as they are stored. Raises InputError for types and settings that cannot be read."""
        if not tensors:
            raise InputError(f"{folder} holds no tensors", fix="Download the model again.")
        if whole_of(config) or str(config.get("model_type")).removeprefix("cla_") in FAMILIES:  # others may mean them
            refuse_numbers(folder, config)
        if outside := around(config, tensors):
            text = {name: tensors[stored] for name, stored in outside.names.items()}
            inner = cls.of(folder, text_config(config, text), text, as_stored=as_stored)
            stored = set(outside.names.values())
            others = {name: info for name, info in tensors.items() if name not in stored}
            return replace(inner, around=outside, others=others)
        config, strays = without_strays(config)
        if as_stored:
            return cls(folder, config, tensors, strays=strays)
        if unknown := {info.dtype for info in tensors.values()} - ELEMENT_SIZE.keys():
            raise InputError(
                f"{folder} holds {', '.join(sorted(unknown))} tensors",
                why="Weights quantised to these types cannot be pooled.",
                fix="Use the unquantised checkpoint of this model.",
            )
        family = FAMILIES.get(str(config.get("model_type")))
        if family is None:
            return cls(folder, config, tensors, strays=strays)
        tensors = _with_prefix(tensors, family)
        if family.fused and config.get("quantization_config") is None:  # packed rows are others
            return cls(folder, config, _split_fused(tensors, family, config), tensors, strays=strays)
        return cls(folder, config, tensors, strays=strays)

    def read(self, name: str, rows: slice = slice(None)) -> "Tensor":
        """Load one tensor, or some rows of it that follow each other (a copy on the CPU)."""
        import torch

        info = self.tensors[name]
        dtype, start = getattr(torch, TORCH_NAMES[info.dtype]), info.start
        shape = info.shape
        if rows != slice(None):
            first, end, _ = rows.indices(shape[0])
            start += first * (info.nbytes // max(1, shape[0]))
            shape = (max(0, end - first), *shape[1:])
        tensor = torch.empty(shape, dtype=dtype)
        with (self.folder / info.file).open("rb") as file:
            file.seek(start)
            found = file.readinto(bytes_of(tensor))
        assert found == tensor.nbytes, f"{info.file} became shorter while it was read"
        return tensor

    def stored_name(self, name: str) -> str:
        """What a tensor is called in the files, of this checkpoint and of an output made from it."""
        return self.around.stored(name) if self.around else name

    def as_stored(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """What an output holds that has these tensors in its language model, by the names in the files."""
        return {self.stored_name(name): info for name, info in tensors.items()} | self.others

    @property
    def positions(self) -> int | None:
        """Positions that the model knows, if there is a limit."""
        return positions_of(self.config)

    @property
    def sidecars(self) -> list[Path]:
        """Files that travel with the model byte for byte: tokenizer, chat template, generation config, licence."""
        files = [file for file in self.folder.iterdir() if file.is_file() and not file.name.startswith(".")]
        files += self.folder.glob(f"{_TEMPLATES}/*.jinja")
        return sorted(f for f in files if f.suffix not in _WEIGHTS and f.name not in _REWRITTEN)

    def copy_sidecars(self, out: Path, *, without: Collection[str] = ()) -> None:
        """Copy them into `out`, but for those named. Raises InputError for a link to a file that is of no model."""
        for file in self.sidecars:
            if file.name not in without:
                _refuse_astray(file, self.folder)
                copy = out / file.relative_to(self.folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)

    @property
    def origin(self) -> dict[str, Any]:
        """What `source.py` recorded about where the folder came from (GGUF type, licence, hub id), if anything."""
        path = self.folder / "cla_source.json"
        return load_json(path) if path.exists() else {}


def bytes_of(tensor: "Tensor") -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def refuse_damaged(folder: Path) -> None:
    """Raise InputError, by name, for a small file of a model that is cut off, no JSON object or no text.

    transformers says of some of them what a parser says, and does without others.
    """
    for path in (path for name in _SMALL if (path := folder / name).exists()):
        refuse_pointer(path)
        load_json(path, put_back(folder, path))
    for path in [*folder.glob("*.jinja"), *folder.glob(f"{_TEMPLATES}/*.jinja")]:
        try:
            path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise unread(error, InputError(f"{path} cannot be read", fix=put_back(folder, path))) from error


def put_back(folder: Path, *paths: Path) -> str:
    """How files of a model become whole again."""
    names = [str(path.relative_to(folder)) for path in paths]
    if (folder / "cla_manifest.json").exists():
        return f"Put {' and '.join(names)} back from a copy of the model, or make the model again."
    own = folder.parent.name != "snapshots"  # of the hub's cache
    where = f" --local-dir {shlex.quote(str(folder))}" if own else ""
    command = f"hf download REPO {' '.join(names)}{where} --force-download"
    return f"Download {' and '.join(names)} of this model again: `{command}`."


def refuse_adapter(folder: Path) -> None:
    """Raise InputError if the folder holds a PEFT adapter, which transformers would load on top of a model."""
    if (folder / "adapter_config.json").exists():
        alone = not (folder / "config.json").exists()
        base = (read_json(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
        raise InputError(
            f"{folder} holds an adapter (adapter_config.json)",
            why=f"It changes a model that is not in the folder{f': {base}' if base else ''}."
            if alone
            else "Its weights stand beside those of the model, and transformers would load both as one.",
            fix="Merge it first: peft's merge_and_unload(), then save_pretrained()."
            + ("" if alone else " Or remove the adapter's files."),
        )


def _with_prefix(tensors: dict[str, TensorInfo], family: Family) -> dict[str, TensorInfo]:
    """Names as the causal model has them: a base model is stored without its prefix, which transformers adds too."""
    prefix, _, layers = family.layers.partition(".")
    if any(name.startswith(f"{prefix}.") for name in tensors) or not any(n.startswith(f"{layers}.") for n in tensors):
        return tensors
    return {name if name.startswith("lm_head.") else f"{prefix}.{name}": info for name, info in tensors.items()}


def _split_fused(tensors: dict[str, TensorInfo], family: Family, config: dict[str, Any]) -> dict[str, TensorInfo]:
    """Replace every fused projection by its blocks of rows: q, then k, then v. Raises InputError if they do not fit.

    Packed ones, and what stands beside them (scales), have other rows and stay as they are.
    """
    rows = shape_of(config).projection_rows
    split: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        place, ordinary = family.place(name), info.dtype in FLOATING
        if not (place and place.module == family.fused and place.part in ("weight", "bias") and ordinary):
            split[name] = info
            continue
        if info.shape[:1] != (sum(rows.values()),):
            raise InputError(
                f"{name} has {info.shape[0] if info.shape else 0} rows where config.json promises {sum(rows.values())}",
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
    single = (folder / "model.safetensors").exists()
    if (folder / INDEX).exists():
        files: dict[str, set[str]] = {}
        weight_map = load_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{folder / INDEX} has no weight_map", fix="Download the model again.")
        for name, file in weight_map.items():
            files.setdefault(str(file), set()).add(name)
        for file in files:
            _refuse_outside(folder, file)
        if not single or files.keys() == {"model.safetensors"}:
            return files
    if single:
        return {"model.safetensors": set()}
    raise InputError(
        f"{folder} has no safetensors weights",
        why=f"It has neither model.safetensors nor {INDEX}.",
        fix="Give a folder in Hugging Face format, a .gguf file or a hub id.",
    )


def _refuse_astray(file: Path, folder: Path) -> None:
    """An output may be published, and a downloaded folder may hold a link to a private key."""
    target = file.resolve()
    if not stays_in(file, folder) and not (target.parent / "config.json").exists():
        raise InputError(
            f"{file} is a link to {target}, which lies in no model folder",
            why="It would be copied into the output.",
            fix="Remove the link, or put the file itself there.",
        )


def _refuse_outside(folder: Path, file: str) -> None:
    if Path(file).name != file or file in (".", "..") or "\0" in file:
        raise InputError(
            f"The index of {folder} names {file!r}, which is outside the folder",
            why="A checkpoint must not reach other files of this machine.",
            fix="Do not use this checkpoint, or mend its index.",
        )
    if not (folder / file).is_file():
        raise InputError(
            f"{folder / file} is missing", why="The index names it.", fix="Download the model again, with all shards."
        )
