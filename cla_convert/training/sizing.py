"""How many sequences fit into one forward and backward pass."""

from typing import Any

import torch

from ..recipe import Train
from .schedule import Budget

_CPU_ROWS = 8
_ENOUGH_TOKENS = 32_768
"""In a pass; more do not make a GPU faster."""
_SHARE = 0.6
"""Of a GPU's memory that we plan to use: the estimate below is rough, and logits and fragmentation come on top."""
_STATE_BYTES = 18
"""A parameter: weight, gradient and two moments in float32, the working copy in bfloat16."""


def micro_batch_size(train: Train, budget: Budget, model: Any, device: str) -> int:
    """Sequences in a pass: as the recipe says, or a power of two that the device should hold, at most a whole batch.

    From the device's total memory, not what is free just now: the same run on the same machine gives the same bits.
    """
    if train.micro_batch_size != "auto":
        return train.micro_batch_size
    if not device.startswith("cuda"):
        return min(_CPU_ROWS, budget.batch)
    room = _SHARE * torch.cuda.get_device_properties(device).total_memory
    room -= _STATE_BYTES * sum(p.numel() for p in model.parameters())
    tokens = min(_ENOUGH_TOKENS, room / activation_bytes(model.config, recomputed=train.activation_checkpointing))
    fit = max(1, int(tokens // budget.length))
    return min(1 << (fit.bit_length() - 1), budget.batch)


def activation_bytes(config: Any, *, recomputed: bool) -> float:
    """Bytes that a token keeps for the backward pass, measured on a Llama that is not compiled (an upper bound).

    Recomputing activations leaves a layer's input in every layer, and all of it in one.
    """
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size  # GPT-2's way to leave it out
    layer = 40 * config.hidden_size + 10 * inner
    inputs = 4 * config.hidden_size * config.num_hidden_layers
    return inputs + 2 * layer if recomputed else config.num_hidden_layers * layer
