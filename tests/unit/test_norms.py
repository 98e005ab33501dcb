"""Splitting a linear stand-in into a projection and a norm: exact where it can be, near where it cannot."""

import math

import pytest
import torch
from torch import Tensor

from cla_convert.conversion import norms
from cla_convert.conversion.attention_weights import AttentionWeights, with_norms
from cla_convert.conversion.group_fit import HeadShape, Projections
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
def test_unequal_gains_follow_a_quarter_turn(dead: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The turn swaps both channels of every pair, so gains must be swapped, too; the fit begins with equal ones.

    Gemma 3 has gains near 0: dividing by them, unturned, would make one channel larger than all others.
    """
    weight, _, x = given(DIM)
    gain = torch.tensor([dead, 8, 1, 0.5, 2, 0.25, 4, 1], dtype=torch.float64)
    first, second = (Norm(gain).rows(len(weight))[:, None] * weight).view(HEADS, 2, DIM // 2, -1).unbind(1)
    wanted, seen = torch.stack([-second, first], 1).flatten(0, 2), (x @ weight.T).square()
    new, norm, error = split(wanted, x, seen, DIM, DIM, DIM)
    torch.testing.assert_close(norm.rows(len(new))[:, None] * new, wanted)
    monkeypatch.setattr(norms, "_fit_to_ones", lambda _, start: start)
    assert norm.gain.max() < 50 and error < 0.5 * split(wanted, x, seen, DIM, DIM, DIM)[2]


def test_the_error_is_judged_on_tokens_that_were_not_fitted() -> None:
    weight, gain, x = given(DIM)
    wanted, seen = Norm(gain).rows(len(weight))[:, None] * weight, (x @ weight.T).square()
    seen[1::2] *= 4  # every second token is twice as long as the fit can know
    assert split(wanted, x, seen, DIM, DIM, DIM)[2] == pytest.approx(math.log(2))


def test_the_norm_of_shared_keys_sees_what_the_members_norms_saw_on_average() -> None:
    weight, gain, x = given(DIM)
    source = AttentionWeights(Projections(weight, weight, weight, weight.T), {"q": Norm(gain), "k": Norm(gain)})
    second, other = x.T @ x / TOKENS, x.clone()
    other[1::2] *= 2  # the consumer's, of those tokens that the error is judged on
    wanted, order = [source.linear(second)] * 2, [range(HEADS)] * 2
    new, error = with_norms([source] * 2, wanted, order, [second] * 2, x, [x, other], HeadShape(HEADS, HEADS, DIM, DIM))
    assert [sorted(weights.norms) for weights in new] == [["k", "q"], ["q"]]
    assert error == pytest.approx(math.log(math.sqrt((1 + 4) / 2)) / 3)  # of q, k and q


def test_dead_channels_and_a_single_token_are_no_trouble() -> None:
    weight, gain, x = given(DIM)
    wanted, seen = Norm(gain).rows(len(weight))[:, None] * weight, (x @ weight.T).square()
    for rows in (slice(0, 5), slice(None)):
        w, s = wanted.clone(), seen.clone()
        w.view(HEADS, DIM, -1)[:, rows], s.view(TOKENS, HEADS, DIM)[:, :, rows] = 0, 0
        for count in (1, TOKENS):
            new, norm, error = split(w, x[:count], s[:count], DIM, DIM, DIM)
            assert new.isfinite().all() and norm.gain.isfinite().all() and norm.gain.max() < 1e3 and error < 1e3
