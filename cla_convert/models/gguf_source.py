"""GGUF files: what they are, and dequantised to float32 safetensors with config and tokenizer, through transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from ..errors import ClaError, InputError
from ..files import write_json
from .checkpoint import Checkpoint, TensorInfo
from .families import family_of
from .gguf_header import Header, read_gguf_header
from .shape import shape_of
from .writer import ShardWriter, infos_of, publishing


def headers(path: Path) -> Checkpoint:
    """A checkpoint that can be described but not read, as float32.

    Raises:
        InputError: the file is not whole.
    """
    with _explained(path):
        header = read_gguf_header(path)
        tensors = {name: TensorInfo(path.name, "F32", shape) for name, shape in header.shapes.items()}
        return Checkpoint(path.parent, header.config(), tensors)


def dequantise(path: Path, digest: str, out: Path) -> None:
    """Publish the model as a folder in Hugging Face format.

    Args:
        path: the file.
        digest: its sha256, for the record.
        out: folder to write.

    Raises:
        InputError: the file is not whole, transformers does not know its architecture, or the family is not supported.
    """
    from transformers import AutoTokenizer

    with _explained(path):
        header = read_gguf_header(path)
        family_of(header.config())  # refuse an unsupported architecture before minutes of dequantising
        _check_sizes(header, path.stat().st_size)
        origin = _origin(header) | {"file": path.name, "sha256": digest, "format": "gguf"}
        model = _load(path)
    config = model.config.to_diff_dict() | {"architectures": [type(model).__name__]}
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    with _explained(path), publishing(out) as staging:
        tied = model._tied_weights_keys if config.get("tie_word_embeddings") else {}
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in (tied or {})}
        writer = ShardWriter(staging, infos_of(state), max_shard_size=5_000_000_000)
        for name, tensor in state.items():
            writer.add(name, tensor)
        writer.finish()
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(staging)
        model.generation_config.save_pretrained(staging)
        write_json(staging / "config.json", config)
        write_json(staging / "cla_source.json", origin)


def _check_sizes(header: Header, size: int) -> None:
    """Raise ValueError, InputError for sizes that the tensors do not have: the model is built before they are read."""
    if sum(prod(shape) for shape in header.shapes.values()) > 8 * size:
        raise ValueError(f"the header describes more numbers than {size} bytes can hold")
    layers = {name.split(".")[1] for name in header.shapes if name.startswith("blk.")}
    if (promised := shape_of(header.config()).num_layers) != len(layers):
        raise ValueError(f"block_count is {promised}, and there are tensors of {len(layers)} layers")
    dimensions = {count for shape in header.shapes.values() for count in shape}
    sizes = {key.partition(".")[2]: value for key, value in header.metadata.items()}
    dense = [] if sizes.get("expert_count") else ["feed_forward_length"]  # which models of experts may leave unused
    for key in ("embedding_length", *dense):
        if isinstance(found := sizes.get(key), int) and found not in dimensions:
            raise ValueError(f"{key} is {found}, and no tensor has that size")


def _load(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )


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
