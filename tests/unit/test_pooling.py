"""Weight-space initialisations: what the shared projections are made of."""

import torch

from cla_convert.conversion.init.first import first
from cla_convert.conversion.init.mean import mean


def test_mean_weighs_every_member_equally():
    members = [torch.full((2, 3), value) for value in (0.0, 3.0, 9.0)]
    assert torch.equal(mean(members), torch.full((2, 3), 4.0))  # pairwise averaging would give 5.25


def test_mean_is_taken_in_float32():
    # In bfloat16 256 + 1 rounds to 256, so a bfloat16 sum would lose the small members.
    members = [torch.tensor([256.0], dtype=torch.bfloat16)] + [torch.tensor([1.0], dtype=torch.bfloat16)] * 3
    assert mean(members).dtype == torch.bfloat16
    assert mean(members).item() == torch.tensor(259 / 4).bfloat16().item() != 64.0


def test_first_is_the_owner():
    owner = torch.randn(3)
    assert first([owner, torch.randn(3)]) is owner
