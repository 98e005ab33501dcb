"""Splitting a linear stand-in into a projection and a norm: exact where it can be, near where it cannot."""

import pytest
import torch
from torch import Tensor

from cla_convert.conversion.norms import Norm, split

HEADS, DIM, INPUTS, TOKENS = 3, 8, 12, 400


def given(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """A projection scaled so that its norm sees a mean square of 1, its gain, and inputs of very unequal lengths."""
    torch.manual_seed(0)
    x = torch.randn(TOKENS, INPUTS, dtype=torch.float64) * torch.rand(TOKENS, 1, dtype=torch.float64) * 9
    weight = torch.randn(HEADS * DIM, INPUTS, dtype=torch.float64)
    weight *= Norm(torch.ones(width, dtype=torch.float64)).scale(weight, x.T @ x / TOKENS)[:, None]
    half = torch.rand(width // DIM, 1, DIM // 2, dtype=torch.float64) * 4 + 0.2
    return weight, half.expand(-1, 2, -1).flatten(), x


def normed(x: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
    y = (x @ weight.T).view(len(x), -1, len(gain))
    return (y * y.square().mean(-1, keepdim=True).rsqrt() * gain).flatten(1)


def rotated(weight: Tensor) -> Tensor:
    """Every rotary pair turned by an angle of its own."""
    first, second = weight.view(HEADS, 2, DIM // 2, -1).unbind(1)
    angle = torch.rand(HEADS, DIM // 2, 1, dtype=torch.float64) * 6
    turned = first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()
    return torch.stack(turned, 1).flatten(0, 2)


@pytest.mark.parametrize("width", [DIM, HEADS * DIM])
def test_a_rotation_of_pairs_with_equal_gains_splits_exactly(width: int) -> None:
    weight, gain, x = given(width)
    wanted = rotated(Norm(gain).rows(len(weight))[:, None] * weight)
    new, norm, error = split(wanted, x, (x @ weight.T).square(), width, DIM, DIM)
    assert error < 1e-9
    sizes = (x @ weight.T).view(TOKENS, -1, width).square().mean(-1).sqrt().repeat_interleave(width, 1)
    torch.testing.assert_close(normed(x, new, norm.gain), (x @ wanted.T) / sizes)


@pytest.mark.parametrize("dead", [0.0, 1e-3])
def test_lengths_stay_although_a_channel_of_a_pair_has_almost_no_gain(dead: float) -> None:
    """Gemma 3 has such gains. Dividing the turned pair by them would make one channel larger than all others."""
    weight, gain, x = given(DIM)
    gain[1] = dead
    wanted = rotated(Norm(gain).rows(len(weight))[:, None] * weight)
    new, norm, error = split(wanted, x, (x @ weight.T).square(), DIM, DIM, DIM)
    assert error < 0.25 and norm.gain.max() < 20
    torch.testing.assert_close(norm.rows(len(new))[:, None] * new, wanted)
