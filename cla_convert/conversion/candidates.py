"""What do whole maps cost? The costs of groups do not quite add up, so likely winners are measured before one wins.

Each map is pooled as conversion would pool it, with the effort of a search, while the probe rows pass through the
layers as they are decided: only one layer's weights are in memory.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .blocks import Factory, SharedKV
from .calibration import calibrated_pooling
from .initialisation import LayerPatch
from .sensitivity import Search, Sensitivity, divergence
from .sharing import groups_of
from .skeleton import Source


def measure_maps(
    source: Source,
    config: dict[str, Any],
    maps: Sequence[Sequence[int | None]],
    tokens: Tensor,
    *,
    search: Search | None = None,
    device: str | Sequence[str] = "cpu",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    spill: Path | None = None,
    kv_heads: int | None = None,
) -> list[Sensitivity]:
    """Pool the model by every map, on the first rows of `tokens`; measure it on the last ones.

    Args:
        source: lazily read checkpoint.
        config: its config.json.
        maps: validated sharing maps.
        tokens: int64 [rows, T] of calibration text, rows in random order.
        search: how thoroughly; default by device.
        device: where layers run; or several, as for `measure_sensitivity`.
        seed: of the order of rows.
        dtype: of matrix products; default by device.
        spill: folder for activations that memory has no room for.
        kv_heads: what every layer will have; default: as many as the source's.
    """
    first = device if isinstance(device, str) else device[0]
    search = search or Search.default(first)
    fit, probe = search.split(tokens)
    factory = Factory(source, config, probe, first, dtype, kv_heads)
    with torch.no_grad():
        clean = _source_end(factory, probe)
        ends = {}
        for sources in map(list, maps):
            patches = calibrated_pooling(
                source, config, sources, fit, device=device, seed=seed, effort=search.effort, dtype=factory.dtype,
                spill=spill, kv_heads=kv_heads,
            )  # fmt: skip
            ends[tuple(sources)] = _end(factory, probe, sources, patches)
        return divergence(factory, probe, clean, ends)


def _source_end(factory: Factory, probe: Tensor) -> Tensor:
    """The residual stream [rows, T, hidden] of the probe rows behind the last layer of the source."""
    stream = factory.skeleton.embed(probe)
    for layer in range(factory.config.num_hidden_layers):
        stream = factory.passage(layer)(stream)
    return stream


def _end(factory: Factory, probe: Tensor, sources: Sequence[int | None], patches: Iterable[LayerPatch]) -> Tensor:
    """The same of the patched model."""
    groups = {group[0]: group for group in groups_of(sources)}
    stream, shared = factory.skeleton.embed(probe), SharedKV()
    for patch in patches:
        owner = sources[patch.layer]
        if owner is None:
            stream = factory.passage(patch.layer)(stream)
            continue
        prefix, group = f"{factory.family.layers}.{patch.layer}.", groups[owner]
        changed = {name.removeprefix(prefix): tensor.to(factory.device) for name, tensor in patch.tensors.items()}
        block = factory.build(patch.layer, factory.read_layer(patch.layer) | changed, group)
        stream = block.past(stream, shared)
        if patch.layer == group[-1]:
            shared.pop(group[0], None)
    return stream
