"""What a process sees of models that are divided among several: its own rows, a whole tensor, what a pass gathers."""

from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as one process would have it. All processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that lies in this process: FSDP2 shards rows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def let_run_gathered(model: Any) -> None:
    """Prepare a sharded model for `run_gathered`."""
    model.run_as_forward = MethodType(_run, model)
    register_fsdp_forward_method(model, "run_as_forward")


def run_gathered(function: Callable[..., T], model: Any, *args: Any, **options: Any) -> T:
    """`function(model, ...)`, with what lies outside the layers of a sharded model gathered until `release`."""
    run = getattr(model, "run_as_forward", None)
    return function(model, *args, **options) if run is None else run(function, *args, **options)


def release(model: torch.nn.Module) -> None:
    """Give back what `run_gathered` has gathered of a model that has no backward pass, which would do it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _run(model: Any, function: Callable[..., T], *args: Any, **options: Any) -> T:
    return function(model, *args, **options)
