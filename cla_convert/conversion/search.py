"""Which layers should share? Measure what each candidate group alone costs, then choose exactly under a budget.

The cost is measured at the end of the model, as the divergence from the source's next-token distribution: the error
right behind the group says little (layers 0 and 1 share almost for free there and cost most at the end). All candidates
walk through the layers side by side, so only one layer's weights are in memory.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .blocks import Block, Factory, SharedKV
from .group_pooling import Pooler
from .matching import Effort
from .shell import Source
from .streams import Store
from .teacher import Teacher


@dataclass(frozen=True)
class Damage:
    """What one group alone costs after calibrated pooling, on text it was not fitted to."""

    layers: tuple[int, ...]
    kl: float
    """Nats per token, source to pooled model."""
    delta_nll: float
    """Rise of the loss, nats per token."""


def owners_for(kv_budget: float, num_layers: int) -> int:
    """How many layers may own K/V within `kv_budget`, a share of the source's KV cache in (0, 1]."""
    if not 0 < kv_budget <= 1:
        raise InputError(f"kv_budget {kv_budget} is not a share of the KV cache", fix="Give a number in (0, 1].")
    return max(1, math.floor(kv_budget * num_layers + 1e-9))


def candidate_groups(kinds: Sequence[str], largest: int) -> list[tuple[int, ...]]:
    """All groups of 2 to `largest` layers that are neighbours within their attention kind."""
    sequences = _by_kind(kinds)
    return sorted(
        tuple(sequence[start : start + size])
        for sequence in sequences
        for size in range(2, largest + 1)
        for start in range(len(sequence) - size + 1)
    )


def choose_map(costs: Mapping[tuple[int, ...], float], kinds: Sequence[str], owners: int) -> list[int]:
    """The sharing map with at most `owners` owners whose groups' costs add up to least. Exact (dynamic programme).

    Raises:
        InputError: no partition into the groups in `costs` (and single layers, which cost nothing) has so few owners.
    """
    plans: dict[int, tuple[float, list[tuple[int, ...]]]] = {0: (0.0, [])}
    for sequence in _by_kind(kinds):
        options = _partitions(sequence, costs)
        merged: dict[int, tuple[float, list[tuple[int, ...]]]] = {}
        for used, (cost, groups) in plans.items():
            for count, (extra, more) in options.items():
                merged = _keep_best(merged, used + count, cost + extra, groups + more)
        plans = merged
    feasible = [plan for count, plan in plans.items() if count <= owners]
    if not feasible:
        raise InputError(
            f"No sharing map has only {owners} of {len(kinds)} layers own K/V",
            why=f"At least {min(plans)} are needed with the groups that were measured.",
            fix="Raise kv_budget.",
        )
    _, groups = min(feasible, key=lambda plan: plan[0])
    owner_of = {layer: group[0] for group in groups for layer in group}
    return [owner_of[layer] for layer in range(len(kinds))]


def measure_damage(
    source: Source,
    config: dict[str, Any],
    kinds: Sequence[str],
    tokens: Tensor,
    *,
    largest: int = 3,
    probe_rows: int = 4,
    device: str = "cpu",
    seed: int = 0,
    effort: Effort | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Damage]:
    """Pool every candidate group alone, on all but the last `probe_rows` of `tokens`; measure it on those.

    Args:
        source: lazily read checkpoint.
        config: its config.json.
        kinds: attention kind of each layer.
        tokens: int64 [rows, T] of calibration text, rows in random order.
        largest: size of the largest group tried.
        probe_rows: rows kept for measuring.
        device: where layers run.
        seed: of the order of rows.
        effort: of the matching.
        on_progress: called with (layers done, layers in all).
    """
    if tokens.dim() != 2 or tokens.shape[0] <= probe_rows:
        raise InputError(f"Choosing a sharing map needs more than {probe_rows} rows of calibration text")
    effort = effort or (Effort(20, 8192, 32_768) if torch.device(device).type == "cuda" else Effort(4, 2048, 8192))
    factory = Factory(source, config, tokens, device)
    fit, probe = tokens[:-probe_rows], tokens[-probe_rows:]
    fit = fit[: max(1, (effort.max_tokens or fit.numel()) // fit.shape[1])]
    with torch.no_grad():
        teacher = Teacher(factory, fit, Store.choose(device, 10 * fit.numel() * factory.config.hidden_size * 4))
        race = _Race(factory, Pooler(factory, teacher, effort, seed), teacher, probe)
        groups = candidate_groups(kinds, largest)
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


def _by_kind(kinds: Sequence[str]) -> list[list[int]]:
    return [[i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]


def _partitions(
    sequence: Sequence[int], costs: Mapping[tuple[int, ...], float]
) -> dict[int, tuple[float, list[tuple[int, ...]]]]:
    """Number of groups -> cheapest partition of a sequence of layers into that many contiguous groups."""
    best: list[dict[int, tuple[float, list[tuple[int, ...]]]]] = [{0: (0.0, [])}]
    longest = max([1, *map(len, costs)])
    for end in range(1, len(sequence) + 1):
        options: dict[int, tuple[float, list[tuple[int, ...]]]] = {}
        for start in range(max(0, end - longest), end):
            group = tuple(sequence[start:end])
            extra = 0.0 if len(group) == 1 else costs.get(group)
            if extra is None:
                continue
            for count, (cost, groups) in best[start].items():
                options = _keep_best(options, count + 1, cost + extra, [*groups, group])
        best.append(options)
    return best[-1]


def _keep_best(
    plans: dict[int, tuple[float, list[tuple[int, ...]]]], count: int, cost: float, groups: list[tuple[int, ...]]
) -> dict[int, tuple[float, list[tuple[int, ...]]]]:
    if count not in plans or cost < plans[count][0]:
        plans[count] = cost, groups
    return plans
