"""One sharing group, pooled: its moments from the streams, the closed form, and the matching that follows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .attention_weights import AttentionWeights, has_biases
from .blocks import Block, Factory
from .group_fit import ClosedForm, Moments, fit_group
from .matching import Effort, Member, match_group
from .streams import SecondMoment, batches
from .teacher import Teacher

_SAMPLE = 4096
"""Tokens that the gains of norms are fitted to and judged by, half of them each."""


@dataclass(frozen=True)
class GroupFit:
    """What calibration found out about one sharing group."""

    layers: tuple[int, ...]
    head_permutation: dict[int, tuple[int, ...]]
    """Per layer: which of its KV heads sits on each shared head."""
    captured_k: float
    """Share of the query-weighted key energy that the closed form keeps."""
    captured_v: float
    """Share of the W_O-weighted value energy that the closed form keeps."""
    damage: float
    """Relative squared error of the members' normed post-attention residual on calibration text, after matching."""
    temperature_error: float | None
    """Families with norms on queries and keys: what of the closed form does not fold, in nats on tokens that were
    not fitted (see `norms`)."""


class Pooler:
    """Pools groups of one model towards one teacher."""

    def __init__(self, factory: Factory, teacher: Teacher, effort: Effort, seed: int) -> None:
        self._factory, self._teacher, self._effort, self._seed = factory, teacher, effort, seed

    def pool(self, group: Sequence[int], student: Tensor) -> tuple[dict[int, dict[str, Tensor]], GroupFit]:
        """New attention weights per layer (a consumer has no k and v), by their name inside the layer."""
        self._teacher.upto(group[-1])
        ready, closed, error = self._closed_form(group, student)
        decided, damage = self.match(ready, group, student)
        permutations = dict(zip(group, closed.permutations, strict=True))
        return decided, GroupFit(tuple(group), permutations, closed.captured_k, closed.captured_v, damage, error)

    def _closed_form(self, group: Sequence[int], student: Tensor) -> tuple[list[Block], ClosedForm, float | None]:
        """Blocks ready to be matched. All float64 ends with this call; float32 is read twice, for want of room."""
        weights = {layer: self._factory.read_layer(layer, mlp=False) for layer in group}
        blocks = [self._factory.build(layer, weights[layer]) for layer in group]
        sources = [AttentionWeights.of(block, weights[layer]) for block, layer in zip(blocks, group, strict=True)]
        with_bias = has_biases(weights[group[0]], f"{blocks[0].family.attention}.")
        del weights
        moments = self._moments(blocks, group, with_bias, student)
        linear = [source.linear(second) for source, second in zip(sources, moments.member, strict=True)]
        shape = self._factory.head_shape(group[0])
        closed = fit_group(shape, linear, moments)
        new, error = self._with_norms(blocks, group, sources, closed, moments, student, with_bias)
        ready = [
            self._factory.build(layer, old | attention.tensors(block, old), group, training=True)
            for layer, block, attention in zip(group, blocks, new, strict=True)
            for old in [self._factory.read_layer(layer, mlp=False)]
        ]
        return ready, replace(closed, members=[]), error

    def match(
        self, blocks: Sequence[Block], group: Sequence[int], student: Tensor
    ) -> tuple[dict[int, dict[str, Tensor]], float]:
        """Match blocks to the teacher; consumers read the teacher's stream, the owner the student's."""
        inputs = [student, *(self._teacher.inputs[layer] for layer in group[1:])]
        targets = [self._teacher.residuals[layer] for layer in group]
        members = [Member(*parts) for parts in zip(blocks, inputs, targets, strict=True)]
        damage = match_group(members, self._effort, seed=self._seed + group[0])
        trained = [{name: p.data for name, p in block.trainable().items()} for block in blocks]
        return dict(zip(group, trained, strict=True)), damage

    def _moments(self, blocks: Sequence[Block], group: Sequence[int], with_bias: bool, student: Tensor) -> Moments:
        """Moments of the normed inputs: the owner's in the student, the members' in the teacher."""
        own, mean = SecondMoment(), SecondMoment()
        cross, member = [SecondMoment() for _ in blocks], [SecondMoment() for _ in blocks]
        for part in batches(student, self._factory.batch):
            x = _append_one(blocks[0].norm_in(student[part].to(self._factory.device)), with_bias)
            own.add(x, x)
            mean.add(x, torch.ones_like(x[..., :1]))
            for i, (layer, block) in enumerate(zip(group, blocks, strict=True)):
                y = _append_one(block.norm_in(self._teacher.inputs[layer][part].to(x.device)), with_bias)
                cross[i].add(x, y)
                member[i].add(y, y)
        return Moments(own.value, mean.value[:, 0], [c.value for c in cross], [m.value for m in member])

    def _with_norms(
        self,
        blocks: Sequence[Block],
        group: Sequence[int],
        sources: Sequence[AttentionWeights],
        closed: ClosedForm,
        moments: Moments,
        student: Tensor,
        with_bias: bool,
    ) -> tuple[list[AttentionWeights], float | None]:
        """The group's weights from the closed form; with norms on queries and keys, also how far it does not fold.

        The norm of shared keys should see what those of the members see on average.
        """
        wanted = [projections.to(moments.owner.device) for projections in closed.members]
        if not sources[0].norms:
            return [AttentionWeights(projections, {}) for projections in wanted], None
        streams = [student, *(self._teacher.inputs[layer] for layer in group)]
        own, *inputs = [
            self._sample(block, stream, with_bias) for block, stream in zip([blocks[0], *blocks], streams, strict=True)
        ]
        seen = [
            {name: _reordered(square, order) for name, square in source.seen(second, x).items()}
            for source, second, x, order in zip(sources, moments.member, inputs, closed.permutations, strict=True)
        ]
        seen[0]["k"] = torch.stack([member.pop("k") for member in seen]).mean(0)
        pairs = [
            source.with_linear(projections, self._factory.head_shape(group[0]), x, squares)
            for source, projections, x, squares in zip(sources, wanted, [own, *inputs[1:]], seen, strict=True)
        ]
        errors = [error for _, found in pairs for error in found]
        return [weights for weights, _ in pairs], sum(errors) / len(errors)

    def _sample(self, block: Block, stream: Tensor, with_bias: bool) -> Tensor:
        """Normed inputs of some tokens of a stream, float64 [n, p]."""
        rows = -(-_SAMPLE // stream.shape[1])
        normed = block.norm_in(stream[:rows].to(self._factory.device)).double().flatten(0, 1)
        return _append_one(normed[:_SAMPLE], with_bias)


def _reordered(rows: Tensor, order: Sequence[int]) -> Tensor:
    """Columns [n, heads * D] of query or KV heads in the order of the shared KV heads."""
    return rows.unflatten(1, (len(order), -1))[:, list(order)].flatten(1)


def _append_one(x: Tensor, with_bias: bool) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1) if with_bias else x
