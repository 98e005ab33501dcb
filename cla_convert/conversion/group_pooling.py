"""One sharing group, pooled: its moments from the streams, the closed form, and block reconstruction."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..bars import tick
from ..effort import Effort
from .attention_weights import AttentionWeights, has_biases, with_norms
from .blocks import Block
from .factories import Factories
from .group_fit import ClosedForm, Moments, fit_group
from .initialisation import GroupFit
from .reconstruction import Member, reconstruct_group
from .source_streams import SourceStreams
from .streams import SecondMoment, Stream, batches

_SAMPLE = 4096
"""Tokens that the gains of norms are fitted to and judged by, half of them each."""


class Pooler:
    """Pools groups of one model towards one teacher."""

    def __init__(self, factories: Factories, teacher: SourceStreams, effort: Effort, seed: int) -> None:
        self._factories, self._factory, self._teacher = factories, factories.first, teacher
        self._effort, self._seed = effort, seed

    def pool(self, group: Sequence[int], student: Stream) -> tuple[dict[int, dict[str, Tensor]], GroupFit]:
        """New attention weights per layer (a consumer has no k and v), by their name inside the layer."""
        tick("matching", 0, f"{_named(group)}: closed form")
        self._teacher.upto(group[-1])
        ready, closed, error = self._closed_form(group, student)
        decided, mismatch = self.reconstruct(ready, group, student)
        permutations = dict(zip(group, closed.permutations, strict=True))
        return decided, GroupFit(tuple(group), permutations, closed.captured_k, closed.captured_v, mismatch, error)

    def _closed_form(self, group: Sequence[int], student: Stream) -> tuple[list[list[Block]], ClosedForm, float | None]:
        """Blocks ready to be matched, of each layer one on each device.

        All float64 ends with this call; float32 is read twice, for want of room.
        """
        weights = {layer: self._factory.read_layer(layer, mlp=False) for layer in group}
        everywhere = [self._factories.build(layer, weights[layer]) for layer in group]
        blocks = [on[0] for on in everywhere]
        sources = [AttentionWeights.of(block, weights[layer]) for block, layer in zip(blocks, group, strict=True)]
        with_bias = has_biases(weights[group[0]], f"{blocks[0].family.attention}.")
        del weights
        moments = self._moments(everywhere, group, with_bias, student)
        del everywhere
        linear = [source.linear(second) for source, second in zip(sources, moments.member, strict=True)]
        shape = self._factory.head_shape(group[0])
        closed = fit_group(shape, linear, moments, kv_heads=self._factory.kv_heads)
        new, error = [AttentionWeights(wanted, {}) for wanted in closed.members], None
        if sources[0].norms:
            wanted = [weights.projections for weights in new]
            samples = self._samples(blocks, group, with_bias, student)
            new, error = with_norms(sources, wanted, closed.permutations, moments.member, *samples, shape)
        ready = [
            self._factories.build(layer, old | attention.tensors(block, old, order), group, training=True)
            for layer, block, attention, order in zip(group, blocks, new, closed.permutations, strict=True)
            for old in [self._factory.read_layer(layer, mlp=False)]
        ]
        return ready, replace(closed, members=[]), error

    def reconstruct(
        self, blocks: Sequence[Sequence[Block]], group: Sequence[int], student: Stream
    ) -> tuple[dict[int, dict[str, Tensor]], float]:
        """Match blocks (of each layer one on each device) to the teacher's.

        Consumers read the teacher's stream, the owner the student's.
        """
        inputs = [student, *(self._teacher.inputs[layer] for layer in group[1:])]
        targets = [self._teacher.residuals[layer] for layer in group]
        members = [Member(*parts) for parts in zip(blocks, inputs, targets, strict=True)]
        mismatch = reconstruct_group(members, self._effort, seed=self._seed + group[0], name=_named(group))
        trained = [{name: p.data for name, p in first.trainable().items()} for first, *_ in blocks]
        return dict(zip(group, trained, strict=True)), mismatch

    def _moments(
        self, blocks: Sequence[Sequence[Block]], group: Sequence[int], with_bias: bool, student: Stream
    ) -> Moments:
        """Moments of the normed inputs: the owner's in the student, the members' in the teacher."""
        own, mean = SecondMoment(), SecondMoment()
        cross, member = [SecondMoment() for _ in blocks], [SecondMoment() for _ in blocks]
        for part in batches(student, self._factories.batch):
            here = [on[part.device] for on in blocks]
            x = _append_one(here[0].norm_in(self._factories.load(student, part)), with_bias)
            own.add(x, x)
            mean.add(x, torch.ones_like(x[..., :1]))
            for i, (layer, block) in enumerate(zip(group, here, strict=True)):
                y = _append_one(block.norm_in(self._factories.load(self._teacher.inputs[layer], part)), with_bias)
                cross[i].add(x, y)
                member[i].add(y, y)
        return Moments(own.value, mean.value[:, 0], [c.value for c in cross], [m.value for m in member])

    def _samples(
        self, blocks: Sequence[Block], group: Sequence[int], with_bias: bool, student: Stream
    ) -> tuple[Tensor, list[Tensor]]:
        """Normed inputs of some tokens, float64 [n, p]: the owner's in the student, the members' in the teacher."""
        rows = torch.arange(min(student.shape[0], -(-_SAMPLE // student.shape[1])))
        streams = [student, *(self._teacher.inputs[layer] for layer in group)]
        own, *members = [
            block.norm_in(self._factory.load(stream.rows(rows, block.device))).double().flatten(0, 1)[:_SAMPLE]
            for block, stream in zip([blocks[0], *blocks], streams, strict=True)
        ]
        return _append_one(own, with_bias), [_append_one(member, with_bias) for member in members]


def _named(group: Sequence[int]) -> str:
    """For a progress bar."""
    return f"layers {group[0]}-{group[-1]}" if len(group) > 1 else f"layer {group[0]}"


def _append_one(x: Tensor, with_bias: bool) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1) if with_bias else x
