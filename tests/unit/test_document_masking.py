"""Documents packed into one row do not see each other: the model gives what it gives for each alone."""

import pytest
import torch

from cla_convert.models.scoring import hidden_states
from cla_convert.recipe import Train
from cla_convert.training.loss import IGNORE, next_token_labels
from cla_convert.training.objective import Objective
from tests.tiny import cla_model, source_model
from tests.unit.test_models import MAPS

LENGTHS = [[9, 14, 1], [1, 1, 22], [24]]
"""Documents in each row of a batch; the last row is one document."""


@pytest.fixture
def documents() -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [[torch.randint(2, 258, (n,), generator=generator) for n in row] for row in LENGTHS]


def packed(documents: list[list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.stack([torch.cat(row) for row in documents])
    return ids, torch.stack([torch.cat([torch.arange(len(d)) for d in row]) for row in documents])


def model(sharing: str | None, implementation: str, seed: int = 0):
    """A CLA model, or with None a plain one; float64, so that the comparison is about the mask."""
    made = cla_model("llama", MAPS[sharing], seed) if sharing else source_model("llama", seed)
    made.set_attn_implementation(implementation)
    return made.double()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("sharing", [None, "cla2-keep-ends", "interleaved"])
def test_packed_documents_equal_the_documents_alone(sharing, implementation, documents):
    some = model(sharing, implementation)
    ids, positions = packed(documents)
    with torch.inference_mode():
        together = hidden_states(some, ids, positions)
        alone = torch.stack([torch.cat([hidden_states(some, d[None])[0] for d in row]) for row in documents])
        unmasked = hidden_states(some, ids)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)  # eager attention has a softmax in float32
    assert (unmasked - alone).abs().max() > 1e-2


@pytest.mark.parametrize(("loss", "checkpointing"), [("cross_entropy", False), ("distill", True)])
def test_the_loss_and_its_gradient_are_those_of_the_documents_alone(loss, checkpointing, documents):
    student = model("cla2-keep-ends", "sdpa").train()
    teacher = model(None, "sdpa", seed=1) if loss == "distill" else None
    objective = Objective(Train(loss=loss), student, teacher)
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, positions = packed(documents)
    denominator = sum(n - 1 for row in LENGTHS for n in row)

    def gradients(losses) -> tuple[float, dict[str, torch.Tensor]]:
        student.zero_grad()
        total = sum(losses)
        total.backward()
        return total.item(), {name: p.grad.clone() for name, p in student.named_parameters()}

    value, mine = gradients([objective(student, ids, positions, denominator)[0]])
    several = [d for row in documents for d in row if len(d) > 1]
    expected, theirs = gradients([objective(student, d[None], None, denominator)[0] for d in several])
    assert value == pytest.approx(expected, rel=1e-6)
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-8)


def test_no_document_predicts_the_next_one(documents):
    ids, positions = packed(documents)
    labels = next_token_labels(ids, positions)
    assert (labels != IGNORE).sum() == sum(n - 1 for row in LENGTHS for n in row)
    ends = [8, 22]
    assert (labels[0, ends] == IGNORE).all() and (labels[0, :8] == ids[0, 1:9]).all()
    assert torch.equal(labels[2], next_token_labels(ids)[2])
