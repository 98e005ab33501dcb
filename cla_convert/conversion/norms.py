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
    """A projection and a norm that together give about `wanted` x, and how far its length is off.

    Args:
        wanted: [rows, p], stand-in that is wanted.
        x: [n, p], inputs. Every second one is for the fit, the others for the error.
        seen: [n, rows], squares of what the norms of the source see of the same tokens, as `AttentionWeights.seen`
            scales them.
        width: channels that are normalised together, which is also the length of the gain.
        head_dim: channels of a head.
        rotary_dim: the first of them that RoPE turns. The fit begins with one factor for both channels of a pair.

    Returns:
        W [rows, p], norm, and the root mean square, in nats, of the logarithm of the factor by which it is too long.
    """
    seen, power = (t.unflatten(1, (-1, width)) for t in (seen, (x @ wanted.T).square()))
    sizes = width * seen.mean(2, keepdim=True)
    sizes = sizes.clamp_min((1e-6 * sizes.mean()).clamp_min(1e-30))  # every token and norm counts alike
    seen, power = seen / sizes, power / sizes
    start = _start(*(_pairwise(t.sum((0, 1)).view(-1, head_dim), rotary_dim).flatten() for t in (seen, power)))
    inverse = _fit_to_ones(power[::2].flatten(0, 1), start)
    error = ((power[1::2] if len(x) > 1 else power) @ inverse).clamp_min(1e-30).log() / 2
    norm = Norm(inverse.rsqrt())
    return wanted / norm.rows(len(wanted))[:, None], norm, error.square().mean().sqrt().item()


def _start(seen: Tensor, power: Tensor) -> Tensor:
    """1 / gain^2 that keeps every channel's share of the norm; dead channels get what is usual."""
    alive = (seen > 0) & (power > 0)
    if not alive.any():
        return torch.ones_like(seen)
    ratio = torch.where(alive, seen / power.clamp_min(1e-300), 0)
    usual = ratio[alive].median()
    return torch.where(alive, ratio.clamp(usual * 1e-4, usual * 1e4), usual)


def _fit_to_ones(parts: Tensor, start: Tensor, steps: int = 200) -> Tensor:
    """Positive h that makes `parts` [n, width] h about 1, by multiplicative updates (Lee and Seung 2000) from `start`.

    Where `start` is a solution already, it stays. It ends early and bounded below, rather than at the optimum.
    """
    gram, target, h = parts.T @ parts, parts.sum(0), start
    for _ in range(steps):
        h = (h * target / (gram @ h).clamp_min(1e-30)).maximum(_FLOOR * start)
    return h


def _pairwise(square: Tensor, rotary_dim: int) -> Tensor:
    """Squares [heads, head_dim] with both channels of a rotary pair given their sum."""
    half = rotary_dim // 2
    pairs = square[:, :half] + square[:, half:rotary_dim]
    return torch.cat([pairs, pairs, square[:, rotary_dim:]], 1)
