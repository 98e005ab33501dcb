"""Pickled weights: what of a `pytorch_model.bin` is a weight."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import warn
from ..errors import InputError, first_line
from ..refusals import unread
from .headers import TORCH_NAMES

if TYPE_CHECKING:
    from torch import Tensor

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Under which trainers put the weights beside their own state."""


def pickled_files(folder: Path) -> list[Path]:
    """The files that transformers would load: pytorch_model.bin, or else its shards."""
    single = folder / "pytorch_model.bin"
    return [single] if single.exists() else sorted(folder.glob("pytorch_model-*.bin"))


def read_pickles(files: list[Path]) -> "dict[str, Tensor]":
    """All tensors by name, mapped and not in memory where the format allows it; a warning says what was left out.

    Raises:
        InputError: a file cannot be loaded with weights_only=True, or holds no tensors by name.
    """
    state: dict[str, Tensor] = {}
    dropped: list[str] = []
    for path in files:
        for name, value in _unwrapped(path, _load(path)).items():
            if _is_weight(value) and isinstance(name, str):
                state[name] = value
            else:
                dropped.append(str(name))
    if dropped:
        more = ", ..." if len(dropped) > 3 else ""
        warn(f"{files[0].parent}: what is not a tensor of an ordinary type is dropped: {', '.join(dropped[:3])}{more}")
    if not state:
        raise InputError(f"{files[0]} holds no weights", why="Expected a dictionary of tensors by name (a state_dict).")
    return state


def _load(path: Path) -> Any:
    import torch

    def load(mapped: bool) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)

    try:
        try:
            return load(mapped=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            return load(mapped=False)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise unread(error, InputError(f"{path} cannot be loaded with weights_only=True", first_line(error))) from error


def _unwrapped(path: Path, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise InputError(
            f"{path} holds no weights",
            why=f"It is a {type(value).__name__}, not a dictionary of tensors by name.",
            fix="Save model.state_dict(), or better: model.save_pretrained(folder).",
        )
    if any(map(_is_weight, value.values())):
        return value
    for name in _WRAPPERS:
        if isinstance(value.get(name), Mapping):
            return _unwrapped(path, value[name])
    return value


def _is_weight(value: Any) -> bool:
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
        return False
    return str(value.dtype).removeprefix("torch.") in TORCH_NAMES.values()
