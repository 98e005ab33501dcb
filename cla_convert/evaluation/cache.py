"""The KV cache as it really is: bytes of live tensors after a real `generate`, nothing computed from the config."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..models.clean_check import cache_argument

PROMPT = 8
"""Tokens of the prompt; the rest is generated."""


def measure_kv_cache(model_dir: Path, *, device: str, tokens: int = 64) -> dict[str, Any]:
    """Generate up to `tokens` and 2 x `tokens` cached positions and take the difference per token.

    Returns:
        bytes_per_token: growth of all live cache tensors per cached token, between the two lengths. A sliding-window
            layer that is full does not grow any more and counts as nothing; `sliding_layers` says how many there are
            and `full_layers` of those how many had stopped growing.
        measured_bytes: bytes of the cache at `tokens` tokens.
        layer_bytes_per_token: the same for every layer; 0 for one that reads another's keys and values.
        state_bytes: of what layers without attention keep instead, which does not grow; in none of the others.
        tokens, cached_layers (layers that hold anything), layers, dtype, bytes_at (both lengths).
    """
    from ..models.placement import load_where_it_fits

    return kv_cache_of(load_where_it_fits(model_dir, device=device), tokens)


def kv_cache_of(model: Any, tokens: int = 64) -> dict[str, Any]:
    """What `measure_kv_cache` returns, of a loaded model."""
    from .quiet import quiet

    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2 * tokens
    tokens = min(tokens, longest // 2)
    with quiet():
        short, long = _measure(model, tokens), _measure(model, 2 * tokens)
    full = [b.sliding and 0 < b.bytes == a.bytes for a, b in zip(short, long, strict=True)]
    sizes = {tokens: sum(layer.bytes for layer in short), 2 * tokens: sum(layer.bytes for layer in long)}
    return {
        "bytes_per_token": (sizes[2 * tokens] - sizes[tokens]) / tokens,
        "layer_bytes_per_token": [(b.bytes - a.bytes) / tokens for a, b in zip(short, long, strict=True)],
        "measured_bytes": sizes[tokens],
        "state_bytes": sum(layer.state_bytes for layer in long),
        "tokens": tokens,
        "bytes_at": {str(length): size for length, size in sizes.items()},
        "layers": len(long),
        "cached_layers": sum(layer.bytes > 0 for layer in long),
        "sliding_layers": sum(layer.sliding for layer in long),
        "full_layers": sum(full),
        "dtype": ", ".join(sorted({layer.dtype for layer in long if layer.bytes})),
    }


class Layer(NamedTuple):
    """What one layer of a cache holds."""

    bytes: int
    """Of keys and values."""
    sliding: bool
    dtype: str
    state_bytes: int
    """Of what a layer without attention keeps instead."""


def live_layers(cache: Any) -> list[Layer]:
    """What every layer of a transformers cache keeps alive, in bytes of distinct storages."""
    found = []
    for layer in cache.layers:
        tensors = [value for value in vars(layer).values() if isinstance(value, torch.Tensor) and value.numel()]
        # A view keeps all of its storage alive, and two tensors may share one: count distinct storages.
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        kept = (getattr(layer, name, {}).values() for name in ("conv_states", "recurrent_states"))
        state = storage_bytes(value for values in kept for value in values if value is not None)
        found.append(Layer(storage_bytes(tensors), bool(getattr(layer, "is_sliding", False)), dtype, state))
    return found


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _measure(model: Any, tokens: int) -> list[Layer]:
    """What every layer holds after `tokens` positions; the cache itself is freed on return."""
    return live_layers(_generate(model, tokens))


@contextmanager
def _no_generation_config(model: Any) -> Iterator[None]:
    """Pass over what a model says of how it generates: with beams, many texts; or another kind of cache."""
    from transformers import GenerationConfig

    stated, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = stated


@torch.no_grad()
def _generate(model: Any, tokens: int) -> Any:
    """The cache of a greedy generation that holds exactly `tokens` positions."""
    # The last generated token is never fed back, so `tokens` cached positions take one more token in the sequence.
    prompt = torch.arange(3, 3 + PROMPT, device=model.device)[None] % model.config.get_text_config().vocab_size
    new = tokens - PROMPT + 1
    with _no_generation_config(model):
        output = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, use_cache=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
    cache = output[cache_argument(model)]
    if cache.get_seq_length() != tokens:
        raise RuntimeError(f"the cache holds {cache.get_seq_length()} positions, not {tokens}")
    return cache
