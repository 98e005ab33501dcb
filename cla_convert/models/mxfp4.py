"""GPT-OSS as published: its experts are packed to four bits (MXFP4). transformers' own code makes bf16 of them.

Saving what transformers has dequantised would not do: it stores the result under the names of the packed tensors.
Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bars import tick
from ..console import progress
from ..errors import InputError
from ..files import write_json
from .checkpoint import Checkpoint
from .headers import TensorInfo
from .writer import ShardWriter, check_disk

_BLOCKS, _SCALES = "_blocks", "_scales"
_IN_A_BLOCK = 32
"""Numbers that share a scale."""


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that experts are packed so."""
    settings = config.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == "mxfp4"


def unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """The same as it will be in bf16, from headers alone; any other checkpoint unchanged.

    Raises:
        InputError: numbers have no scales of their shape.
    """
    if not is_packed(checkpoint.config):
        return checkpoint
    packed = {
        n.removesuffix(_BLOCKS): i for n, i in checkpoint.tensors.items() if n.endswith(_BLOCKS) and len(i.shape) == 4
    }
    for name, info in packed.items():
        scales = checkpoint.tensors.get(name + _SCALES)
        if scales is None or (scales.shape, scales.dtype, info.dtype) != (info.shape[:3], "U8", "U8"):
            raise InputError(
                f"{name}{_BLOCKS} has no scales that fit",
                why=f"Experts in MXFP4 have a byte in {name}{_SCALES} for each block of 32 numbers.",
                fix="Download the model again, with all shards.",
            )
    scales = {name + _SCALES for name in packed}
    tensors = {}
    for name, info in checkpoint.tensors.items():
        if (whole := name.removesuffix(_BLOCKS)) in packed:
            tensors[whole] = _in_bf16(info)
        elif name not in scales:
            tensors[name] = info
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return replace(checkpoint, config=config | {"dtype": "bfloat16"}, tensors=tensors)


def dequantise(checkpoint: Checkpoint, out: Path) -> None:
    """Write a checkpoint with its experts in bf16, one tensor of one layer at a time. Raises InputError."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    made = unpacked(checkpoint)
    check_disk(out, sum(info.nbytes for info in made.tensors.values()))
    writer = ShardWriter(out, made.tensors, max_shard_size=5_000_000_000)
    with progress(len(made.tensors), "dequantising", unit="tensor", counts="tensors"):
        for name, info in made.tensors.items():
            if name in checkpoint.tensors:
                writer.copy(name, checkpoint.folder / info.file, info.start)
            else:
                packed = (checkpoint.read(name + part) for part in (_BLOCKS, _SCALES))
                writer.add(name, convert_moe_packed_tensors(*packed).contiguous())
            tick("tensors")
    writer.finish()
    checkpoint.copy_sidecars(out)
    write_json(out / "config.json", made.config)
    write_json(out / "cla_source.json", {"folder": checkpoint.folder.name, "quantization": "MXFP4 experts"})


def _in_bf16(blocks: TensorInfo) -> TensorInfo:
    """Experts, outputs, blocks and bytes -> experts, inputs and outputs, as the model holds them."""
    experts, outputs, count, _ = blocks.shape
    return replace(blocks, dtype="BF16", shape=(experts, count * _IN_A_BLOCK, outputs))
