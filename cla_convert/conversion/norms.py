"""Families that normalise queries and keys: linear stand-ins for what the norms give, and the way back.

Behind a norm a key is diag(gain) W x / r(x), with r the root mean square of W x over a head (Qwen 3, Gemma 3) or over
all heads (OLMo 2). Calibrated pooling works on the linear map diag(gain) W / r_0, r_0^2 = E[r^2]. What it returns, S,
is split into a new gain and W = diag(1 / gain) S, whose r(x) should be what it was, token by token; else keys or
queries come out too long or short, which is a temperature of the softmax. r(x)^2 is linear in 1 / gain^2, so the gain
is a non-negative least squares problem. If the change is a rotation of rotary pairs whose two gains agree, it is exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_FLOOR = 0.1
"""Of 1 / gain^2, relative to where the fit begins: without it channels end with gains that no step size suits."""


@dataclass(frozen=True)
class Norm:
    """The gain of a query or key norm, per channel: [head_dim], shared by all heads, or [heads * head_dim]."""

    gain: Tensor

    def rows(self, rows: int) -> Tensor:
        """The gain of every row of a projection."""
        return self.gain.repeat(rows // len(self.gain))

    def scale(self, weight: Tensor, second: Tensor) -> Tensor:
        """1 / r_0 of every row of `weight` [rows, p], for inputs with second moment `second` [p, p]."""
        square = ((weight @ second) * weight).sum(1).view(-1, len(self.gain)).mean(1)
        return square.clamp_min(1e-30).rsqrt().repeat_interleave(len(self.gain))

    def linear(self, weight: Tensor, second: Tensor) -> Tensor:
        """The linear stand-in of norm and gain behind `weight`."""
        return (self.rows(len(weight)) * self.scale(weight, second))[:, None] * weight


def split(
    wanted: Tensor, x: Tensor, seen: Tensor, width: int, head_dim: int, rotary_dim: int
) -> tuple[Tensor, Norm, float]:
    """A projection and a norm that together give about `wanted` x, and by how much the result comes out too long.

    Args:
        wanted: [rows, p], stand-in that is wanted.
        x: [n, p], inputs.
        seen: [n, rows], squares of what the norms of the source see of the same tokens, the mean of each row about 1.
        width: channels that are normalised together, which is also the length of the gain.
        head_dim: channels of a head.
        rotary_dim: the first of them that RoPE turns. The fit begins with one factor for both channels of a pair.

    Returns:
        W [rows, p], norm, and the root mean square of the logarithm of the factor, in nats.
    """
    power, sizes = (x @ wanted.T).square(), seen.unflatten(1, (-1, width)).mean(-1).flatten()
    totals = [_pairwise(t.sum(0).view(-1, width // head_dim, head_dim).sum(0), rotary_dim) for t in (seen, power)]
    start = (totals[0] / totals[1].clamp_min(1e-30)).flatten()
    start = start.clamp(start.median() * 1e-4, start.median() * 1e4)
    relative = power.view(-1, width) / (width * sizes.clamp_min(1e-6 * sizes.mean()))[:, None]
    inverse = _fit_to_ones(relative, start)
    error = ((relative @ inverse).clamp_min(1e-30).log() / 2).square().mean().sqrt().item()
    norm = Norm(inverse.rsqrt())
    return wanted / norm.rows(len(wanted))[:, None], norm, error


def _fit_to_ones(parts: Tensor, start: Tensor, steps: int = 200) -> Tensor:
    """Positive h that makes `parts` [n, width] h about 1, by multiplicative updates (Lee and Seung 2000) from `start`.

    Where `start` is a solution already, it stays. Few data leave h near it.
    """
    gram, target, h = parts.T @ parts, parts.sum(0), start
    for _ in range(steps):
        h = (h * target / (gram @ h).clamp_min(1e-30)).maximum(_FLOOR * start)
    return h


def _pairwise(square: Tensor, rotary_dim: int) -> Tensor:
    """Mean squares [groups, head_dim] with both channels of a rotary pair given their sum."""
    half = rotary_dim // 2
    pairs = square[:, :half] + square[:, half:rotary_dim]
    return torch.cat([pairs, pairs, square[:, rotary_dim:]], 1)
