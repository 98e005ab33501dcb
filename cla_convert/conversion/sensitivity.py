"""What does each candidate group alone cost? Pooled as conversion would, measured at the end of the model.

The cost is the divergence from the source's next-token distribution: the error right behind the group says little
(layers 0 and 1 share almost for free there and cost most at the end). All candidates walk through the layers side by
side, so only one layer's weights are in memory, and the new attention weights of the groups that are under way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..effort import Effort
from ..errors import InputError
from ..models.scoring import kl, log_probabilities, nll, positions_at_a_time
from ..models.shape import shape_of
from .blocks import Factory, SharedKV
from .factories import Factories, devices_for
from .group_pooling import Pooler
from .search import candidate_groups
from .skeleton import Source
from .source_streams import SourceStreams
from .streams import Store

_POSITIONS = 256
"""Next-token distributions compared at a time at most: what a mask of as many positions may take."""


@dataclass(frozen=True)
class Search:
    """How thoroughly candidates are measured."""

    largest: int
    """Layers of the largest group tried."""
    probe_rows: int
    """Rows of text kept for measuring."""
    effort: Effort
    fit_tokens: int
    """Calibration tokens that candidates are fitted to."""

    @classmethod
    def default(cls, device: str) -> "Search":
        """Half a minute for a 135M model on a data-centre GPU, ten minutes on two CPU cores."""
        if torch.device(device).type == "cuda":
            return cls(4, 4, Effort(20, 8192), 32_768)
        return cls(3, 4, Effort(4, 2048), 8192)

    def check_rows(self, rows: int, length: int) -> None:
        """Raise InputError if so many rows of calibration text leave nothing to fit to."""
        if rows <= self.probe_rows:
            raise InputError(
                f"Choosing a sharing map needs more than {self.probe_rows} rows of calibration text",
                why=f"It measures on {self.probe_rows} and fits to the others; there are {rows}, of {length} tokens.",
                fix=f"Give {(self.probe_rows + 1) * length} tokens or more (convert.calibration.tokens, data.sources), "
                "or shorter rows (convert.calibration.sequence_length).",
            )

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of `tokens` [rows, T] to fit to, and others to measure on. Raises InputError if there are too few."""
        self.check_rows(*tokens.shape)
        fit, probe = tokens[: -self.probe_rows], tokens[-self.probe_rows :]
        return fit[: max(1, self.fit_tokens // fit.shape[1])], probe


@dataclass(frozen=True)
class Sensitivity:
    """What sharing costs after calibrated pooling, on text it was not fitted to."""

    layers: tuple[int | None, ...]
    """One group that shares alone; or a whole map, the owner of every layer."""
    kl: float
    """Nats per token, source to pooled model."""
    delta_nll: float
    """Rise of the loss, nats per token."""

    @property
    def group(self) -> tuple[int, ...]:
        """`layers`, of a group: all of them have keys and values."""
        return tuple(layer for layer in self.layers if layer is not None)


def measure_sensitivity(
    source: Source,
    config: dict[str, Any],
    kinds: Sequence[str],
    tokens: Tensor,
    *,
    search: Search | None = None,
    device: str | Sequence[str] = "cpu",
    seed: int = 0,
    spill: Path | None = None,
    kv_heads: int | None = None,
) -> list[Sensitivity]:
    """Pool every candidate group alone, on the first rows of `tokens`; measure it on the last ones.

    Where heads are pooled, single layers are candidates, too: they cost something then.

    Args:
        source: lazily read checkpoint.
        config: its config.json.
        kinds: attention kind of each layer.
        tokens: int64 [rows, T] of calibration text, rows in random order.
        search: how thoroughly; default by device.
        device: where layers run; or several, which share the rows that candidates are fitted to. What measures them
            runs on the first.
        seed: of the order of rows.
        spill: folder for activations that memory has no room for.
        kv_heads: what pooled layers will have; default: as many as the source's.

    Raises:
        InputError: the family is not supported, there is too little text, or the disk of `spill` is full.
    """
    search = search or Search.default(device if isinstance(device, str) else device[0])
    fit, probe = search.split(tokens)
    devices = devices_for(device, shape_of(config).hidden_size, len(fit))
    factory = Factory(source, config, tokens, devices[0], kv_heads=kv_heads)
    factories = Factories(factory, devices)
    groups = candidate_groups(kinds, search.largest, 1 if factory.pools_heads else 2)
    streams = 10 * fit.numel() + len(groups) * probe.numel()
    store = Store.choose(factories.devices, streams * factory.config.hidden_size * 4, spill)
    with torch.no_grad():
        teacher = SourceStreams(factories, fit, store)
        race = _Race(factory, Pooler(factories, teacher, search.effort, seed), teacher, probe, store)
        for layer in range(len(kinds)):
            race.step(layer, [group for group in groups if group[0] == layer])
        return race.finish()


class _Race:
    """The candidates' streams on the probe rows, one layer at a time, beside the unchanged model's."""

    def __init__(self, factory: Factory, pooler: Pooler, teacher: SourceStreams, probe: Tensor, store: Store) -> None:
        self._factory, self._pooler, self._teacher, self._probe = factory, pooler, teacher, probe
        self._store = store
        self._clean = factory.skeleton.embed(probe)
        self._streams: dict[tuple[int, ...], Tensor] = {}
        self._weights: dict[tuple[int, ...], dict[int, dict[str, Tensor]]] = {}
        self._shared: dict[tuple[int, ...], SharedKV] = {}

    def step(self, layer: int, starting: Sequence[tuple[int, ...]]) -> None:
        """Pool the groups that start here; move all streams past the layer."""
        self._teacher.upto(layer)
        for group in starting:
            self._weights[group], _ = self._pooler.pool(group, self._teacher.inputs[layer])
            (stream,) = self._store.whole(*self._clean.shape, dtype=torch.float32).shares
            self._streams[group], self._shared[group] = stream.copy_(self._clean), {}
        weights = self._factory.read_layer(layer)
        unchanged = self._factory.passage(layer, weights)
        for group, stream in self._streams.items():
            past = unchanged
            if layer in group:
                changed = weights | self._weights[group].pop(layer)
                past = partial(self._factory.build(layer, changed, group).past, shared=self._shared[group])
            if layer == group[-1]:
                self._shared.pop(group)
            stream.copy_(past(stream.to(self._factory.device)))
        self._clean = unchanged(self._clean)
        self._teacher.release(layer)

    def finish(self) -> list[Sensitivity]:
        """Compare next-token distributions."""
        return divergence(self._factory, self._probe, self._clean, self._streams)


def divergence(
    factory: Factory, probe: Tensor, clean: Tensor, streams: Mapping[tuple[int, ...], Tensor]
) -> list[Sensitivity]:
    """What the ends of `streams` [rows, T, hidden] say of the tokens `probe` [rows, T] against `clean`."""
    divergences, losses = dict.fromkeys(streams, 0.0), dict.fromkeys(streams, 0.0)
    head = factory.skeleton.head(factory.dtype)
    (rows, length), step = probe.shape, min(_POSITIONS, positions_at_a_time(factory.config.vocab_size))

    def log_p(stream: Tensor, row: int, part: slice) -> Tensor:
        return log_probabilities(head(stream[row : row + 1, part].to(factory.device))[0])

    for row, start in product(range(rows), range(0, length - 1, step)):
        part = slice(start, min(start + step, length - 1))
        labels = probe[row, part.start + 1 : part.stop + 1].to(factory.device)
        wanted = log_p(clean, row, part)
        base = _total(nll(wanted, labels))
        for layers, stream in streams.items():
            found = log_p(stream, row, part)
            divergences[layers] += _total(kl(wanted, found))
            losses[layers] += _total(nll(found, labels)) - base
    count = rows * (length - 1)
    return [Sensitivity(layers, divergences[layers] / count, losses[layers] / count) for layers in streams]


def _total(values: Tensor) -> float:
    return values.cpu().double().sum().item()
