"""Closed-form calibrated pooling of one sharing group: shared W_K, W_V and every member's re-based W_Q, W_O. Float64.

Every projection of this file acts on x, or on [x; 1] in families with biases (the bias is then its last column).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .head_matching import match_heads
from .keys import RotaryFit, fit_rotary, fold_queries, mix_rotary, rotary_gram
from .refit import ridge_towards
from .values import BasisFit, channel_energy, fit_basis, fit_channels, fold_free_queries, fold_outputs, square_roots

_PAIRS = 256
"""Pairs of heads compared at a time: of multi-head attention there are a thousand, of 256 channels together."""


@dataclass(frozen=True)
class HeadShape:
    """Sizes of an attention layer."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    """Channels of a head that RoPE turns: the first ones. 0 for a NoPE layer."""
    gated: bool = False
    """Whether each channel of a head's values meets a gate of its own before W_O."""

    @property
    def repeat(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Projections:
    """Weights of one attention layer, float64: q, k, v act on x or [x; 1]; o is [hidden, heads * head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


@dataclass(frozen=True)
class Moments:
    """Second moments of a group's normed inputs over the calibration tokens, float64 [p, p]."""

    owner: Tensor
    """E[x_a x_a^T], x_a the owner's input in the student: what consumers will see."""
    owner_mean: Tensor
    """E[x_a], [p]."""
    cross: Sequence[Tensor]
    """Per member E[x_a x_b^T], x_b its input in the teacher."""
    member: Sequence[Tensor]
    """Per member E[x_b x_b^T]."""


@dataclass(frozen=True)
class ClosedForm:
    """The group's new projections (consumers' k and v are meaningless) and what was found on the way."""

    members: list[Projections]
    permutations: list[tuple[int, ...]]
    """Per member: its KV heads in the order of the shared heads that they sit on, as many on each."""
    captured_k: float
    captured_v: float


@dataclass(frozen=True)
class _Second:
    """Second moments of all members' fitted keys and values, and what their errors cost. m = members * KV heads."""

    shape: HeadShape
    k: Tensor
    """[m, m, D, D]"""
    v: Tensor
    """[m, m, D, D]"""
    k_rotary: Tensor
    """Complex [F, m, m]"""
    q_energy: Tensor
    """[F, m]: root of the query energy that sees each rotary channel."""
    q_roots: tuple[Tensor, Tensor]
    """[m, D', D'] of the D' free channels: root and inverse of E[q q^T] summed over the KV head's query heads."""
    o_roots: tuple[Tensor, Tensor]
    """[m, D, D]: root and inverse of W_O^T W_O summed likewise."""


def fit_group(
    shape: HeadShape,
    members: Sequence[Projections],
    moments: Moments,
    *,
    kv_heads: int | None = None,
    strength: float = 1e-3,
    mean_weight: float = 0.1,
) -> ClosedForm:
    """Pool one group (owner first): regress on the owner's input, match heads, fit shared heads, fold the rest.

    A group of one comes back as it is, unless its heads are pooled.

    Args:
        shape: sizes, the same for all members.
        members: the teacher's projections.
        moments: of the inputs.
        kv_heads: shared heads, a divisor of the members'. Default: as many.
        strength: ridge of the regression onto the owner's input.
        mean_weight: share of the mean's outer product kept when directions are chosen. Mostly centred, because a
            constant key shifts all logits of a query alike and softmax does not see it.
    """
    shared = kv_heads or shape.kv_heads
    if len(members) == 1 and shared == shape.kv_heads:
        return ClosedForm(list(members), [tuple(range(shape.kv_heads))], 1.0, 1.0)
    fitted = [
        [ridge_towards(weight, moments.owner, cross @ weight.T, strength) for weight in (member.k, member.v)]
        for member, cross in zip(members, moments.cross, strict=True)
    ]
    keys, values = (torch.cat(parts) for parts in zip(*fitted, strict=True))
    spread = moments.owner - (1 - mean_weight) * moments.owner_mean.outer(moments.owner_mean)
    second = _second_moments(shape, members, moments, keys, values, spread)
    permutations = match_heads(partial(_pair_scores, second), len(members), shape.kv_heads, shared)
    return _assemble(second, members, keys, values, permutations, shape.kv_heads // shared)


def _second_moments(
    shape: HeadShape, members: Sequence[Projections], moments: Moments, keys: Tensor, values: Tensor, spread: Tensor
) -> _Second:
    total, dim, rotary, half = len(members) * shape.kv_heads, shape.head_dim, shape.rotary_dim, shape.rotary_dim // 2
    grams = ((w @ spread @ w.T).cpu() for w in (keys, values))
    gram_k, gram_v = (gram.view(total, dim, total, dim).transpose(1, 2) for gram in grams)
    q_parts, o_parts = [], []
    for member, second in zip(members, moments.member, strict=True):
        heads = member.q.view(shape.kv_heads, shape.repeat, dim, -1)
        q_parts.append(torch.einsum("krip,krjp->kij", heads @ second, heads).cpu())
        outputs = member.o.view(-1, shape.kv_heads, shape.repeat, dim)
        o_parts.append(torch.einsum("dkri,dkrj->kij", outputs, outputs).cpu())
    q_metric = torch.cat(q_parts)
    diagonal = q_metric.diagonal(dim1=1, dim2=2)
    energy = (diagonal[:, :half] + diagonal[:, half:rotary]).clamp_min(0).sqrt().T
    q_roots = square_roots(q_metric[:, rotary:, rotary:])
    return _Second(
        shape, gram_k, gram_v, rotary_gram(gram_k, rotary), energy, q_roots, square_roots(torch.cat(o_parts))
    )


@dataclass(frozen=True)
class _KeyFit:
    """One shared key head."""

    turning: RotaryFit
    """Of the channels with RoPE."""
    free: BasisFit | None
    """Of the others, if there are any."""

    @property
    def energy(self) -> tuple[float, float]:
        """Captured, and in all."""
        parts = [part for part in (self.turning, self.free) if part is not None]
        return sum(part.captured for part in parts), sum(part.total for part in parts)

    def to(self, device: torch.device) -> "_KeyFit":
        """The same on another device."""
        return _KeyFit(self.turning.to(device), self.free and self.free.to(device))


def _fit_keys(second: _Second, heads: Sequence[int]) -> _KeyFit:
    """Fit one shared key head for `heads` (indices into m): RoPE channels, and the free ones if any."""
    rotary, index = second.shape.rotary_dim, torch.tensor(heads)
    turning = fit_rotary(second.k_rotary[:, index][:, :, index], second.q_energy[:, index])
    if rotary == second.shape.head_dim:
        return _KeyFit(turning, None)
    free = _stacked(second.k[:, :, rotary:, rotary:], index[None])[0]
    return _KeyFit(turning, fit_basis(free, *(list(part[index]) for part in second.q_roots)))


def _fit_values(second: _Second, heads: Sequence[int]) -> BasisFit:
    index = torch.tensor(heads)
    fit = fit_channels if second.shape.gated else fit_basis
    return fit(_stacked(second.v, index[None])[0], *(list(part[index]) for part in second.o_roots))


def _stacked(gram: Tensor, index: Tensor) -> Tensor:
    """Gram matrices [P, n * D, n * D] of P selections [P, n] of heads, from blocks [m, m, D, D]."""
    blocks = gram[index[:, :, None], index[:, None, :]].transpose(2, 3)
    return blocks.flatten(3).flatten(1, 2)


def _pair_scores(second: _Second, pairs: Tensor) -> Tensor:
    """Captured share of K plus that of V, [P], if two heads (indices [P, 2]) shared one."""
    rotary = second.shape.rotary_dim
    weighted = second.q_energy[:, :, None] * second.k_rotary * second.q_energy[:, None, :]
    power = torch.linalg.eigvalsh(weighted[:, pairs[:, :, None], pairs[:, None, :]])
    free_kept, free_total = _basis_power(second.k[:, :, rotary:, rotary:], second.q_roots[0], pairs)
    keys = (power[..., -1].sum(0) + free_kept) / (power.sum((0, -1)) + free_total).clamp_min(1e-30)
    value_power = _channel_power if second.shape.gated else _basis_power
    kept, total = value_power(second.v, second.o_roots[0], pairs)
    return keys + kept / total.clamp_min(1e-30)


def _basis_power(gram: Tensor, roots: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Energy that a shared head of D channels keeps of two, and their energy, [P] each, from blocks [m, m, D, D]."""
    width = gram.shape[-1]
    weighted = roots[:, None] @ gram @ roots[None]
    power = torch.cat([torch.linalg.eigvalsh(_stacked(weighted, part)) for part in pairs.split(_PAIRS)])
    return power[:, width:].sum(-1), power.sum(-1)


def _channel_power(gram: Tensor, roots: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The same where a shared head's channels may only be scaled (`fit_channels`)."""
    energy, own = channel_energy(roots)[pairs], gram.diagonal(dim1=2, dim2=3)
    blocks = own[pairs[:, :, None], pairs[:, None, :]] * energy[:, :, None] * energy[:, None, :]
    power = torch.linalg.eigvalsh(blocks.movedim(-1, 1))
    return power[..., -1].sum(-1), power.sum((-1, -2))


def _assemble(
    second: _Second,
    members: Sequence[Projections],
    keys: Tensor,
    values: Tensor,
    permutations: list[tuple[int, ...]],
    each: int,
) -> ClosedForm:
    """Fit every shared head with the matched heads, `each` of a member, and write the new projections."""
    shape = second.shape
    results = [replace(m, q=torch.empty_like(m.q), o=torch.empty_like(m.o)) for m in members]
    shared_k, shared_v = [], []
    k_energy, v_energy = np.zeros(2), np.zeros(2)
    key_heads, value_heads = (w.view(-1, shape.head_dim, w.shape[1]) for w in (keys, values))
    for first in range(0, shape.kv_heads, each):
        places = [(b, place) for b in range(len(members)) for place in range(first, first + each)]
        index = [b * shape.kv_heads + permutations[b][place] for b, place in places]
        key_fit, value_fit = _fit_keys(second, index).to(keys.device), _fit_values(second, index).to(keys.device)
        shared_k.append(_shared_key(shape, key_heads[index], key_fit))
        shared_v.append(value_fit.basis.T @ value_heads[index].flatten(0, 1))
        k_energy += key_fit.energy
        v_energy += value_fit.captured, value_fit.total
        for i, (b, place) in enumerate(places):
            _fold(shape, members[b], results[b], permutations[b][place], place, i, key_fit, value_fit)
    results[0] = replace(results[0], k=torch.cat(shared_k), v=torch.cat(shared_v))
    captured = (float(part / whole) if whole else 1.0 for part, whole in (k_energy, v_energy))  # of nothing, all
    return ClosedForm(results, permutations, *captured)


def _shared_key(shape: HeadShape, heads: Tensor, fit: _KeyFit) -> Tensor:
    """Rows [D, p] of the shared W_K, from the members' heads [n, D, p]."""
    free = fit.free
    rows = [mix_rotary(head[: shape.rotary_dim], fit.turning.mix[:, b]) for b, head in enumerate(heads)]
    shared = torch.stack(rows).sum(0)
    return shared if free is None else torch.cat([shared, free.basis.T @ heads[:, shape.rotary_dim :].flatten(0, 1)])


def _fold(
    shape: HeadShape,
    old: Projections,
    new: Projections,
    old_head: int,
    place: int,
    i: int,
    key_fit: _KeyFit,
    value_fit: BasisFit,
) -> None:
    """Write a member's query heads of KV head `old_head`, the i-th of the fits, re-based, to their new `place`.

    Places are counted in KV heads of the source: those of a shared head follow each other, as attention expects it.
    """
    turning, free = key_fit.turning, key_fit.free
    for r in range(shape.repeat):
        source, target = (_channels(shape, head * shape.repeat + r) for head in (old_head, place))
        rows = old.q[source]
        parts = [fold_queries(rows[: shape.rotary_dim], turning.scale[:, i])]
        if free is not None:
            parts.append(fold_free_queries(rows[shape.rotary_dim :], free.maps[i]))
        new.q[target] = torch.cat(parts)
        new.o[:, target] = fold_outputs(old.o[:, source], value_fit.maps[i])


def _channels(shape: HeadShape, query_head: int) -> slice:
    return slice(query_head * shape.head_dim, (query_head + 1) * shape.head_dim)
