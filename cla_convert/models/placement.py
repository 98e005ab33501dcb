"""Where a model lies: on one device or, if that has no room for it, its layers one after another over all GPUs.

Keys and values that consumers read follow the layers by themselves: accelerate moves what a layer is called with to the
layer's GPU, and the dict that they travel in moves in place (transformers' `KVSharingDict`).

accelerate's own `infer_auto_device_map` keeps room on the first GPU for a layer that comes from the disk, and sends to
the disk what would have fitted otherwise: models of two thirds of two GPUs, here.
"""

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..console import human_bytes, say
from ..errors import InputError
from .checkpoint import Checkpoint
from .export import empty_model, load_model
from .headers import FLOATING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

USABLE = 0.9
"""Of the free memory of a GPU, for weights; the rest is for what is computed."""
_TRIES = 16
"""Loads of a GPU that are tried, from an even one to a full one."""


def load_where_it_fits(folder: Path, *, dtype: torch.dtype | str = "auto", device: str) -> "PreTrainedModel":
    """`load_model`; over all GPUs where `device` is `cuda` without a number and the first has no room for the weights.

    Raises:
        InputError: as `load_model`, or all GPUs together have no room.
    """
    if device != "cuda" or torch.cuda.device_count() < 2:
        return load_model(folder, dtype=dtype, device=device)
    gc.collect()  # an earlier model that lay on several GPUs is held by cycles
    torch.cuda.empty_cache()
    return load_model(folder, dtype=dtype, device=device, parts=laid_over(folder, dtype, free_memory()))


def free_memory() -> list[int]:
    """Bytes, of every GPU."""
    return [torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())]


def laid_over(folder: Path, dtype: torch.dtype | str, free: Sequence[int]) -> dict[str, int] | None:
    """Part of a model -> the GPU that it lies on, of GPUs with so many free bytes; None: all fits on the first.

    Raises:
        InputError: they have no room, or as `empty_model`.
    """
    model, room = _sized(folder, dtype), [int(USABLE * size) for size in free]
    needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if needed <= room[0]:
        return None
    even = needed / len(room)
    for attempt in range(_TRIES + 1):
        load = int(even + (max(room) - even) * attempt / _TRIES)
        if parts := _filled(model, [min(load, size) for size in room]):
            say(f"{folder.name} takes {human_bytes(needed)}: its layers lie on {len(set(parts.values()))} GPUs")
            return parts
    raise InputError(
        f"The GPUs of this machine have no room for {folder.name}",
        why=f"Its weights take {human_bytes(needed)}; free are {', '.join(map(human_bytes, free))}.",
        fix="Use more GPUs, or --set device=cpu. Divergence from the source takes both models at once: "
        "--set eval.agreement_tokens=0 --set eval.domain_tokens=0 does without.",
    )


def _filled(model: nn.Module, room: Sequence[int]) -> dict[str, int] | None:
    """Parts in the order of the model, one GPU filled after the other; None if some are left."""
    parts, where = dict[str, int](), dict[nn.Parameter, int]()
    gpu, left = 0, list(room)
    for name, part in _parts(model, set(getattr(model, "_no_split_modules", None) or ())):
        new = [weight for weight in part.parameters() if weight not in where]
        tied = [where[weight] for weight in part.parameters() if weight in where]
        if tied and not new:  # a head that is the embedding
            parts[name] = tied[0]
            continue
        size = sum(tensor.nbytes for tensor in (*new, *part.buffers()))
        while gpu < len(left) and left[gpu] < size:
            gpu += 1
        if gpu == len(left):
            return None
        left[gpu] -= size
        parts[name] = gpu
        where |= dict.fromkeys(new, gpu)
    return parts


def _parts(module: nn.Module, whole: set[str], name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What lies on one device, by name: layers, and what else does not contain any."""
    if type(module).__name__ in whole or not any(type(part).__name__ in whole for part in module.modules()):
        yield name, module
        return
    for child, part in module.named_children():
        yield from _parts(part, whole, f"{name}.{child}" if name else child)


def _sized(folder: Path, dtype: torch.dtype | str) -> Any:
    """The model without weights, in the dtype that it will be loaded in."""
    if dtype == "auto":
        checkpoint = Checkpoint.open(folder)
        stored = next(
            (FLOATING[info.dtype] for info in checkpoint.tensors.values() if info.dtype in FLOATING), "float32"
        )
        dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or stored
    return empty_model(folder, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
