"""Families that normalise queries and keys: linear stand-ins for what the norms give, and the way back.

Behind a norm a key is diag(gain) W x / r(x), with r the root mean square of W x over a head (Qwen 3, Gemma 3) or over
all heads (OLMo 2). Calibrated pooling works on the linear map diag(gain) W / r_0, r_0^2 = E[r^2]. What it returns is
split into a new gain and a new W such that the channels of W x keep the proportions they had; then norm and gain give
the wanted key or query up to one scalar per token and head, a temperature of the softmax, whose spread is reported.
If the change is a rotation of rotary pairs whose two gains agree, the scalar is 1 and the fold exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """The gain of a query or key norm, per channel: [head_dim], shared by all heads, or [heads * head_dim]."""

    gain: Tensor

    def rows(self, rows: int) -> Tensor:
        """The gain of every row of a projection."""
        return self.gain.repeat(rows // len(self.gain))

    def scale(self, weight: Tensor, second: Tensor) -> Tensor:
        """1 / r_0 of every row of `weight` [rows, p], for inputs with second moment `second` [p, p]."""
        square = mean_squares(weight, second).view(-1, len(self.gain)).mean(1)
        return square.clamp_min(1e-30).rsqrt().repeat_interleave(len(self.gain))

    def linear(self, weight: Tensor, second: Tensor) -> Tensor:
        """The linear stand-in of norm and gain behind `weight`."""
        return (self.rows(len(weight)) * self.scale(weight, second))[:, None] * weight

    def split(
        self, wanted: Tensor, before: Tensor, second: Tensor, head_dim: int, rotary_dim: int, order: Tensor
    ) -> tuple[Tensor, "Norm"]:
        """A projection and a norm that together give about `wanted` x.

        Args:
            wanted: [rows, p], stand-in that is wanted.
            before: [rows, p], stand-in of the source layer.
            second: [p, p], second moment of x.
            head_dim: channels of a head.
            rotary_dim: the first of them that RoPE turns; the two channels of a pair get one factor.
            order: [heads], which head of `before` became each head of `wanted`.
        """
        shape = (-1, len(self.gain) // head_dim, head_dim)
        old, gain = before.view(len(order), head_dim, -1)[order].flatten(0, 1), self._ordered(order, head_dim)
        power = [_pairwise(mean_squares(w, second).view(shape).sum(0), rotary_dim) for w in (wanted, old)]
        ratio = (power[0] / power[1].clamp_min(1e-30)).sqrt().clamp(1e-3, 1e3).flatten()
        norm = Norm(gain * ratio)
        rows = norm.rows(len(wanted))
        return wanted / torch.where(rows.abs() > 1e-6, rows, 1e-6)[:, None], norm

    def _ordered(self, order: Tensor, head_dim: int) -> Tensor:
        return self.gain if len(self.gain) == head_dim else self.gain.view(-1, head_dim)[order].flatten()


def mean_squares(weight: Tensor, second: Tensor) -> Tensor:
    """E[(w x)^2] of every row w, [rows]."""
    return ((weight @ second) * weight).sum(1).clamp_min(0)


def temperature_error(x: Tensor, before: Tensor, after: Tensor, width: int) -> float:
    """Root mean square, in nats, of the logarithm of the factor by which queries or keys come out too long or short.

    Args:
        x: [tokens, p].
        before: [rows, p], what the source's norm sees, rows in the order of `after`.
        after: [rows, p], what the new one sees. Both scaled to a mean square of 1.
        width: channels that are normalised together.
    """
    sizes = [(x @ w.T).view(len(x), -1, width).square().mean(-1).clamp_min(1e-30).log() / 2 for w in (before, after)]
    return (sizes[1] - sizes[0]).square().mean().sqrt().item()


def _pairwise(square: Tensor, rotary_dim: int) -> Tensor:
    """Mean squares [groups, head_dim] with both channels of a rotary pair given their sum."""
    half = rotary_dim // 2
    pairs = square[:, :half] + square[:, half:rotary_dim]
    return torch.cat([pairs, pairs, square[:, rotary_dim:]], 1)
