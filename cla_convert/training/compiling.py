"""torch.compile where the time goes: the decoder layers, one kind at a time.

All layers of a kind run the same code, so each kind is compiled once, not once a layer (torchtitan compiles blocks for
the same reason): seconds instead of minutes. The causal mask stays outside: traced, transformers cannot see that it
is a plain causal one, writes it out, and attention loses its fast kernel.
"""

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import InputError
from ..models.families import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


WORTH_IT = 1e16
"""Floating-point operations from which compiling pays: it takes about half a minute and doubles some 150 TFLOP/s."""

_VARIANTS = 64
"""How many variants of a layer torch may compile before it gives up: kinds of attention times roles in sharing."""


def choose_compile(wanted: Literal["auto"] | bool, device_type: str, flops: float) -> bool:
    """Whether to compile a run of so many floating-point operations. Raises InputError if it cannot be done."""
    # torch generates Triton for a GPU, C++ for a CPU.
    possible = device_type == "cpu" or importlib.util.find_spec("triton") is not None
    if wanted is True and not possible:
        raise InputError(
            "torch.compile needs Triton on this device, which is not installed",
            fix="pip install triton, or set train.compile=auto.",
        )
    return wanted is True or (wanted == "auto" and device_type == "cuda" and possible and flops >= WORTH_IT)


def compile_layers(model: "PreTrainedModel", rows: int, length: int) -> None:
    """Let the decoder layers of `model` run compiled on `rows` sequences of `length` tokens, for good.

    Anything else (validation) runs as before: every shape would be compiled again. The model's K/V sharing must travel
    in `shared_kv_states`, keyed by the owner's index.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    sources = getattr(model.config, "kv_source_layers", None)
    for index, layer in enumerate(decoder_layers(model)):
        owner = None if sources is None else sources[index]
        layer.forward = _layer_forward(layer, index, owner, (rows, length))


def _layer_forward(layer: Any, index: int, owner: int | None, shape: tuple[int, int]) -> Callable[..., Any]:
    """`layer.forward` with the sharing of K/V, and activation checkpointing, outside of the compiled part.

    Compiled code is made anew for every index that it reads, and for every content of a dictionary that it reads. So
    inside, whatever the layer reads or hands on has the index 0.
    """
    forward, compiled = layer.forward, _compiled_layer()
    checkpointing = getattr(layer, "gradient_checkpointing", False)
    layer.gradient_checkpointing = False
    for module in layer.modules():
        if hasattr(module, "kv_source"):
            module.kv_source = module.layer_idx = 0

    def run(hidden: torch.Tensor, *args: Any, shared_kv_states: Any = None, **kwargs: Any) -> Any:
        received = None if shared_kv_states is None else shared_kv_states.get(owner)
        shares = shared_kv_states is not None
        call = compiled if hidden.shape[:2] == shape else _layer
        if checkpointing and layer.training:
            call = partial(layer._gradient_checkpointing_func, call)
        result, handed = call(forward, hidden, shares, received, args, kwargs)
        if shares and received is None and handed is not None:
            shared_kv_states[index] = handed
        return result

    return run


def _layer(
    forward: Callable[..., Any], hidden: torch.Tensor, shares: bool, received: Any, args: Any, kwargs: dict[str, Any]
) -> Any:
    """The layer's result, and the K/V that it hands on or has received (None: neither)."""
    if not shares:
        return forward(hidden, *args, **kwargs), None
    shared = {} if received is None else {0: received}
    return forward(hidden, *args, shared_kv_states=shared, **kwargs), shared.get(0)


@cache
def _compiled_layer() -> Callable[..., Any]:
    return torch.compile(_layer, dynamic=False)
