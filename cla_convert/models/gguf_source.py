"""GGUF files: what they are, and dequantised to float32 safetensors with config and tokenizer.

Tensors are read, dequantised and written one at a time. Everything that the file holds must have a place in the model,
and the model must find everything that it needs: transformers' own reader passes over what it does not know.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ClaError, InputError
from ..files import write_json
from .checkpoint import Checkpoint
from .families import family_of
from .fit import model_class, model_config, unused_tensors
from .gguf_config import config_of
from .gguf_header import Header, read_gguf_header
from .gguf_names import ARCHITECTURES, Target, target_of
from .gguf_rope import FACTOR_TENSORS
from .headers import TensorInfo
from .shape import shape_of
from .whole import unversioned
from .writer import ShardWriter, check_disk


def headers(path: Path) -> Checkpoint:
    """A checkpoint that can be described but not read, as float32.

    Raises:
        InputError: the file is not whole.
    """
    with _explained(path):
        header = _header(path)
        tensors = {name: TensorInfo(path.name, "F32", shape) for name, shape in header.shapes.items()}
        return Checkpoint(path.parent, header.config(), tensors)


def as_converted(path: Path) -> Checkpoint:
    """What `dequantise` would write, and no numbers of it. Raises InputError as that does."""
    with _explained(path):
        model = _Model.read(path)
        return Checkpoint.of(path.parent, model.config, model.infos)


def check(path: Path) -> None:
    """Raise InputError, by name, for a file that would not arrive whole in a model of transformers."""
    with _explained(path):
        _Model.read(path)


def dequantise(path: Path, digest: str, out: Path) -> None:
    """Write the model in Hugging Face format.

    Args:
        path: the file.
        digest: its sha256, for the record.
        out: an empty folder.

    Raises:
        InputError: the file is not whole, the family is not supported, or a tensor or setting of the file has no place
            in transformers' model.
    """
    from transformers import AutoTokenizer, GenerationConfig

    with _explained(path):
        model = _Model.read(path)
        origin = _origin(model.header) | {"file": path.name, "sha256": digest, "format": "gguf"}
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    check_disk(out, sum(info.nbytes for info in model.infos.values()))
    with _explained(path):
        model.write(ShardWriter(out, model.infos, max_shard_size=5_000_000_000))
    tokenizer.save_pretrained(out)
    config = model_config(model.config)
    GenerationConfig.from_model_config(config).save_pretrained(out)
    settings = {"architectures": [model_class(config).__name__], "dtype": "float32"}
    write_json(out / "config.json", unversioned(config.to_diff_dict()) | settings)
    write_json(out / "cla_source.json", origin)


@dataclass(frozen=True)
class _Model:
    """A GGUF file as a model of transformers: what is in it, where it goes."""

    path: Path
    header: Header
    config: dict[str, Any]
    targets: dict[str, Target]
    infos: dict[str, TensorInfo]
    """Of the tensors that will be written."""

    @classmethod
    def read(cls, path: Path) -> "_Model":
        """From the header and the RoPE factors. Raises InputError for what has no place or is missing."""
        header = _header(path)
        family_of(header.config())
        architecture = str(header.metadata["general.architecture"])
        if architecture not in ARCHITECTURES:
            raise InputError(
                f"GGUF files of the architecture {architecture!r} are not supported",
                fix=f"Supported: {', '.join(ARCHITECTURES)}. Or use the safetensors checkpoint.",
            )
        _check_sizes(header, path.stat().st_size)
        found = {name: target_of(architecture, name) for name in header.shapes if name not in FACTOR_TENSORS}
        targets = {name: target for name, target in found.items() if target}
        if unknown := sorted(found.keys() - targets.keys()):
            raise _no_place(unknown)
        factors = {name: _contents(path, header, name) for name in FACTOR_TENSORS if name in header.shapes}
        config = config_of(header, factors)
        infos = {
            part: TensorInfo(path.name, "F32", shape)
            for name, target in targets.items()
            for part, shape in target.parts(header.shapes[name]).items()
        }
        if unused := unused_tensors(config, infos):
            raise _no_place(
                [name for name, target in targets.items() if unused & target.parts(header.shapes[name]).keys()]
            )
        return cls(path, header, config, targets, infos)

    def write(self, writer: ShardWriter) -> None:
        """Dequantise every tensor."""
        import torch

        for name, target in self.targets.items():
            heads = self.config["num_key_value_heads" if ".attn_k." in name else "num_attention_heads"]
            parts = target.parts(self.header.shapes[name])
            contents = target.contents(_contents(self.path, self.header, name), heads)
            for part, tensor in zip(parts, contents, strict=True):
                writer.add(part, torch.from_numpy(np.ascontiguousarray(tensor)))
        writer.finish()


def _header(path: Path) -> Header:
    """The header of a language model's file. Raises InputError for an adapter or a projector, and for half a file."""
    header, size = read_gguf_header(path), path.stat().st_size
    if header.metadata.get("general.type") == "adapter" or "adapter.type" in header.metadata:
        base = header.metadata.get("general.base_model.0.name")
        raise InputError(
            f"{path} is an adapter (LoRA), and no model",
            fix=f"Merge it into its model{f' ({base})' if base else ''} first, and give that.",
        )
    if header.metadata.get("general.architecture") == "clip" or header.metadata.get("general.type") == "mmproj":
        raise InputError(
            f"{path} is an image projector (mmproj), and no language model",
            fix="Give the language model's GGUF file, which lies beside it where both were downloaded.",
        )
    ends = {name: header.places[name].start + _stored_bytes(header, name) for name in header.shapes}
    if missing := [name for name, end in ends.items() if end > size]:
        raise InputError(
            f"{path} is not whole: it has {size} bytes, and should have {max(ends.values())}",
            why=f"{len(missing)} of its {len(ends)} tensors lie behind its end, such as {missing[0]}.",
            fix="Download it again.",
        )
    return header


def _stored_bytes(header: Header, name: str) -> int:
    """Bytes of a tensor in the file; 0 of a type that this gguf does not know."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind, count = header.places[name].type, prod(header.shapes[name])
    if kind not in list(GGMLQuantizationType):
        return 0
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return -(-count // block) * size


def _check_sizes(header: Header, size: int) -> None:
    """Raise ValueError, InputError for sizes that the tensors do not have: the model is built before they are read."""
    if sum(prod(shape) for shape in header.shapes.values()) > 8 * size:
        raise ValueError(f"the header describes more numbers than {size} bytes can hold")
    layers = {name.split(".")[1] for name in header.shapes if name.startswith("blk.")}
    if (promised := shape_of(header.config()).num_layers) > len(layers):  # fewer: the others have no place, by name
        raise ValueError(f"block_count is {promised}, and there are tensors of {len(layers)} layers")
    dimensions = {count for shape in header.shapes.values() for count in shape}
    sizes = {key.partition(".")[2]: value for key, value in header.metadata.items()}
    dense = [] if sizes.get("expert_count") else ["feed_forward_length"]  # which models of experts may leave unused
    for key in ("embedding_length", *dense):
        if isinstance(found := sizes.get(key), int) and found not in dimensions:
            raise ValueError(f"{key} is {found}, and no tensor has that size")


def _no_place(names: list[str]) -> InputError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return InputError(
        f"The GGUF file has tensors that transformers' model has no place for: {', '.join(names[:3])}{more}",
        why="The model would be another one without them.",
        fix="Use the safetensors checkpoint of this model.",
    )


def _contents(path: Path, header: Header, name: str) -> np.ndarray:
    """One tensor in float32."""
    from gguf import GGMLQuantizationType, quants

    kind, shape = GGMLQuantizationType(header.places[name].type), header.shapes[name]
    plain = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2", GGMLQuantizationType.F64: "<f8"}
    stored = shape if kind in plain else quants.quant_shape_to_byte_shape(shape, kind)
    count = int(np.prod(stored, dtype=np.int64))
    data = np.fromfile(path, plain.get(kind, "u1"), count, offset=header.places[name].start)
    if data.size != count:
        raise ValueError(f"it ends within {name}")
    data = data.reshape(stored)
    return data.astype(np.float32) if kind in plain else quants.dequantize(data, kind).reshape(shape)


def _origin(header: Header) -> dict[str, Any]:
    """Name, licence and quantisation, for the manifest and the report."""
    from gguf import LlamaFileType

    kind = header.metadata.get("general.file_type")
    return {
        "name": header.metadata.get("general.name"),
        "license": header.metadata.get("general.license"),
        "quantization": LlamaFileType(kind).name.removeprefix("MOSTLY_") if kind is not None else None,
    }


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn whatever reading raises into an InputError that names the file."""
    try:
        yield
    except ClaError:
        raise
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as a GGUF model",
            why=f"{type(error).__name__}: {error}",
            fix="Check that the file is whole and its architecture is known to transformers.",
        ) from error
