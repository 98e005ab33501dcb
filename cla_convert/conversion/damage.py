"""What does each candidate group alone cost? Pooled as conversion would, measured at the end of the model.

The cost is the divergence from the source's next-token distribution: the error right behind the group says little
(layers 0 and 1 share almost for free there and cost most at the end). All candidates walk through the layers side by
side, so only one layer's weights are in memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .blocks import Block, Factory, SharedKV
from .group_pooling import Pooler
from .matching import Effort
from .search import candidate_groups
from .shell import Source
from .streams import Store
from .teacher import Teacher


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
        return cls(3, 2, Effort(4, 2048), 8192)


@dataclass(frozen=True)
class Damage:
    """What one group alone costs after calibrated pooling, on text it was not fitted to."""

    layers: tuple[int, ...]
    kl: float
    """Nats per token, source to pooled model."""
    delta_nll: float
    """Rise of the loss, nats per token."""


def measure_damage(
    source: Source,
    config: dict[str, Any],
    kinds: Sequence[str],
    tokens: Tensor,
    *,
    search: Search | None = None,
    device: str = "cpu",
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Damage]:
    """Pool every candidate group alone, on the first rows of `tokens`; measure it on the last ones.

    Args:
        source: lazily read checkpoint.
        config: its config.json.
        kinds: attention kind of each layer.
        tokens: int64 [rows, T] of calibration text, rows in random order.
        search: how thoroughly; default by device.
        device: where layers run.
        seed: of the order of rows.
        on_progress: called with (layers done, layers in all).
    """
    search = search or Search.default(device)
    if tokens.dim() != 2 or tokens.shape[0] <= search.probe_rows:
        raise InputError(f"Choosing a sharing map needs more than {search.probe_rows} rows of calibration text")
    factory = Factory(source, config, tokens, device)
    fit, probe = tokens[: -search.probe_rows], tokens[-search.probe_rows :]
    fit = fit[: max(1, search.fit_tokens // fit.shape[1])]
    with torch.no_grad():
        teacher = Teacher(factory, fit, Store.choose(device, 10 * fit.numel() * factory.config.hidden_size * 4))
        race = _Race(factory, Pooler(factory, teacher, search.effort, seed), teacher, probe)
        groups = candidate_groups(kinds, search.largest)
        for layer in range(len(kinds)):
            race.step(layer, [group for group in groups if group[0] == layer])
            if on_progress:
                on_progress(layer + 1, len(kinds))
        return race.finish()


class _Race:
    """The candidates' streams on the probe rows, one layer at a time, beside the unchanged model's."""

    def __init__(self, factory: Factory, pooler: Pooler, teacher: Teacher, probe: Tensor) -> None:
        self._factory, self._pooler, self._teacher, self._probe = factory, pooler, teacher, probe
        self._clean = factory.shell.embed(probe)
        self._streams: dict[tuple[int, ...], Tensor] = {}
        self._weights: dict[tuple[int, ...], dict[int, dict[str, Tensor]]] = {}
        self._shared: dict[tuple[int, ...], SharedKV] = {}

    def step(self, layer: int, starting: Sequence[tuple[int, ...]]) -> None:
        """Pool the groups that start here; move all streams past the layer."""
        self._teacher.upto(layer)
        for group in starting:
            self._weights[group], _ = self._pooler.pool(group, self._teacher.inputs[layer])
            self._streams[group], self._shared[group] = self._clean, {}
        weights = self._factory.read_layer(layer)
        unchanged = self._factory.build(layer, weights)
        for group, stream in self._streams.items():
            block, shared = unchanged, {}
            if layer in group:
                changed = weights | self._weights[group].pop(layer)
                block, shared = self._factory.build(layer, changed, group), self._shared[group]
            if layer == group[-1]:
                self._shared.pop(group)
            self._streams[group] = _through(block, stream, shared)
        self._clean = _through(unchanged, self._clean, {})
        self._teacher.release(layer)

    def finish(self) -> list[Damage]:
        """Compare next-token distributions, one row at a time."""
        kl, nll = dict.fromkeys(self._streams, 0.0), dict.fromkeys(self._streams, 0.0)
        head = self._factory.shell.head(self._factory.dtype)
        rows, length = self._probe.shape
        for row in range(rows):
            labels = self._probe[row, 1:, None].to(self._factory.device)
            wanted = head(self._clean[row : row + 1])[0, :-1]
            base = wanted.gather(1, labels).sum().item()
            for group, stream in self._streams.items():
                found = head(stream[row : row + 1])[0, :-1]
                kl[group] += (wanted.exp() * (wanted - found)).sum().item()
                nll[group] += base - found.gather(1, labels).sum().item()
        count = rows * (length - 1)
        return [Damage(group, kl[group] / count, nll[group] / count) for group in kl]


def _through(block: Block, stream: Tensor, shared: SharedKV) -> Tensor:
    return block.mlp(block.attend(stream, block.heads(block.norm_in(stream), shared)))
