"""A model under test, and what it is made to do: prefill, decode, hold a cache of a given size."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..evaluation.cache import live_layers, storage_bytes
from ..models.clean_check import cache_argument

PROTOTYPE = 64
"""Positions whose keys and values are really computed; a filled cache repeats them."""


@dataclass
class Subject:
    """One of the two models."""

    name: str
    """source or converted."""
    folder: Path
    model: Any
    device: str

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters and buffers, tied ones once."""
        return storage_bytes([*self.model.parameters(), *self.model.buffers()])


def token_ids(model: Any, batch: int, length: int) -> torch.Tensor:
    """Arbitrary token ids [batch, length]: speed and memory do not depend on which."""
    ids = torch.arange(3, 3 + length, device=model.device) % model.config.get_text_config().vocab_size
    return ids.expand(batch, -1).contiguous()


@torch.no_grad()
def prefill(model: Any, batch: int, length: int) -> Any:
    """Run `length` tokens of `batch` sequences in one pass and return the cache."""
    output = model(input_ids=token_ids(model, batch, length), use_cache=True, logits_to_keep=1)
    return output[cache_argument(model)]


@torch.no_grad()
def decode(model: Any, cache: Any, batch: int, steps: int) -> None:
    """Greedy decoding over `cache`, `steps` tokens for each of `batch` sequences."""
    ids, given = token_ids(model, batch, 1), {cache_argument(model): cache}
    for _ in range(steps):
        logits = model(input_ids=ids, **given, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(dim=-1, keepdim=True)


@torch.no_grad()
def filled_cache(model: Any, batch: int, length: int) -> Any:
    """A dynamic cache of `batch` sequences of `length` positions, every layer in memory of its own.

    It is allocated as `generate` would have left it, without the activations of a prefill: a server reads prompts in
    pieces, so they need not fit beside a full cache. The contents are real keys and values, repeated.
    """
    from transformers import DynamicCache

    real = prefill(model, 1, min(length, PROTOTYPE))
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(real.layers):
        if not hasattr(layer, "keys"):  # a layer without attention: its state has one size for any length
            _keep_state(cache, index, layer, batch)
            continue
        if layer.keys is None:  # a consumer
            continue
        sliding = getattr(layer, "is_sliding", False)
        held = min(length, layer.sliding_window - 1) if sliding else length
        positions = torch.arange(held, device=model.device) % layer.keys.shape[2]
        keys, values = (part[:, :, positions].expand(batch, -1, -1, -1) for part in (layer.keys, layer.values))
        cache.update(keys, values, index)
        if sliding:  # it has seen more than it holds
            layers: Any = cache.layers
            layers[index].cumulative_length = length
    return cache


def _keep_state(cache: Any, index: int, layer: Any, batch: int) -> None:
    """Give layer `index` of `cache` the state of `layer`, for every sequence of a batch."""
    for states, update in (
        (layer.conv_states, cache.update_conv_state),
        (layer.recurrent_states, cache.update_recurrent_state),
    ):
        for number, state in states.items():
            if state is not None:
                update(state.repeat_interleave(batch, 0), index, state_idx=number)


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache keeps alive."""
    return sum(layer.bytes + layer.state_bytes for layer in live_layers(cache))


def release(device: str, *, failed: bool) -> None:
    """Give freed memory back, so that the next measurement starts from the same state."""
    if failed:
        gc.collect()  # what an out-of-memory error left in cycles
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    """Wait until the device has done what it was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()
