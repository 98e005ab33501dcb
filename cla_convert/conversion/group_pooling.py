"""One sharing group, pooled: its moments from the streams, the closed form, and the matching that follows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .blocks import Block, Factory
from .group_fit import HeadShape, Moments, Projections, fit_group
from .matching import Effort, Member, match_group
from .streams import SecondMoment, batches
from .teacher import Teacher


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


class Pooler:
    """Pools groups of one model towards one teacher."""

    def __init__(self, factory: Factory, teacher: Teacher, effort: Effort, seed: int) -> None:
        self._factory, self._teacher, self._effort, self._seed = factory, teacher, effort, seed
        config, self._batch = factory.config, factory.batch
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._shape = HeadShape(config.num_attention_heads, config.num_key_value_heads, dim, factory.rotary_dim)

    def pool(self, group: Sequence[int], student: Tensor) -> tuple[dict[int, dict[str, Tensor]], GroupFit]:
        """New attention weights per layer (a consumer has no k and v), by their name inside the layer."""
        owner = group[0]
        self._teacher.upto(group[-1])
        weights = {layer: self._factory.read_layer(layer, mlp=False) for layer in group}
        biased = has_biases(weights[owner])
        moments = self._moments(weights, biased, student)
        closed = fit_group(self._shape, [projections(weights[layer], biased) for layer in group], moments)
        blocks = []
        for layer, member in zip(group, closed.members, strict=True):
            new = weights[layer] | {k: v.to(self._factory.device) for k, v in tensors_of(member, biased).items()}
            blocks.append(self._factory.build(layer, new, consumer=layer != owner, training=True))
        decided, damage = self.match(blocks, group, student)
        permutations = dict(zip(group, closed.permutations, strict=True))
        return decided, GroupFit(tuple(group), permutations, closed.captured_k, closed.captured_v, damage)

    def _moments(self, weights: dict[int, dict[str, Tensor]], biased: bool, student: Tensor) -> Moments:
        """Moments of the normed inputs: the owner's in the student, the members' in the teacher."""
        blocks = {layer: self._factory.build(layer, tensors) for layer, tensors in weights.items()}
        owner, *_ = blocks
        own, cross, member = SecondMoment(), [SecondMoment() for _ in blocks], [SecondMoment() for _ in blocks]
        mean = SecondMoment()
        for part in batches(student, self._batch):
            x = _append_one(blocks[owner].norm_in(student[part].to(self._factory.device)), biased)
            own.add(x, x)
            mean.add(x, torch.ones_like(x[..., :1]))
            for i, (layer, block) in enumerate(blocks.items()):
                y = _append_one(block.norm_in(self._teacher.inputs[layer][part].to(x.device)), biased)
                cross[i].add(x, y)
                member[i].add(y, y)
        return Moments(own.value, mean.value[:, 0], [c.value for c in cross], [m.value for m in member])

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


def has_biases(weights: dict[str, Tensor]) -> bool:
    """Whether q, k and v have biases. Raises InputError if only some do."""
    found = {f"self_attn.{name}_proj.bias" in weights for name in "qkv"}
    if len(found) > 1:
        raise InputError(
            "--init calibrated needs biases on all of q_proj, k_proj and v_proj, or on none",
            fix="Use --init mean.",
        )
    return found.pop()


def projections(weights: dict[str, Tensor], biased: bool) -> Projections:
    """float64 projections of a layer; biases become the last column of q, k and v."""
    parts = [weights[f"self_attn.{name}_proj.weight"].double() for name in "qkvo"]
    if biased:
        for i, name in enumerate("qkv"):
            bias = weights[f"self_attn.{name}_proj.bias"].double()
            parts[i] = torch.cat([parts[i], bias[:, None]], 1)
    return Projections(*parts)


def tensors_of(member: Projections, biased: bool) -> dict[str, Tensor]:
    """The inverse of `projections`, float32."""
    tensors = {"self_attn.o_proj.weight": member.o.float()}
    for name, value in (("q", member.q), ("k", member.k), ("v", member.v)):
        weight = value[:, :-1] if biased else value
        tensors[f"self_attn.{name}_proj.weight"] = weight.float().contiguous()
        if biased:
            tensors[f"self_attn.{name}_proj.bias"] = value[:, -1].float().contiguous()
    return tensors


def _append_one(x: Tensor, biased: bool) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1) if biased else x
