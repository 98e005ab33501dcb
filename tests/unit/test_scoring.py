"""The scoring core against the definitions, in float64."""

import torch

from cla_convert.models.scoring import kl, log_probabilities, nll, output_head, positions_at_a_time, split_model
from tests.tiny import cla_model, source_model


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    one, other = 3 * torch.randn(2, 7, 41, generator=generator)
    return one, other


def test_kl_is_from_the_first_to_the_second():
    first, second = logits()
    q, p = first.double().softmax(-1), second.double().softmax(-1)
    found = kl(log_probabilities(first), log_probabilities(second))
    torch.testing.assert_close(found.double(), (q * (q / p).log()).sum(-1), rtol=1e-5, atol=1e-6)
    assert (kl(log_probabilities(first), log_probabilities(first)) == 0).all()


def test_nll_is_that_of_the_targets():
    first, _ = logits()
    targets = torch.arange(7) * 5
    expected = -first.double().softmax(-1).log()[torch.arange(7), targets]
    torch.testing.assert_close(nll(log_probabilities(first), targets).double(), expected, rtol=1e-6, atol=1e-6)


def test_a_large_vocabulary_takes_fewer_positions():
    assert positions_at_a_time(262_144) == 64 and positions_at_a_time(258) > 60_000 and positions_at_a_time(2**30) == 1


def test_a_model_is_split_at_its_head_only_where_nothing_follows_it():
    ids = torch.arange(2, 18)[None]
    for model, plain in ((cla_model("llama", None), True), (source_model("granite"), False)):
        body, head = split_model(model, ids)
        assert (head is output_head(model)) == plain
        torch.testing.assert_close(head(body(ids)), model(input_ids=ids).logits)
