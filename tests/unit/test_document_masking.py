"""Documents packed into one row do not see each other: the model gives what it gives for each alone."""

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention

from cla_convert.recipe import Train
from cla_convert.training.loss import IGNORE, next_token_labels
from cla_convert.training.objective import Objective, hidden_states, skip_other_documents
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


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention as plain arithmetic: not compiled it needs no GPU, and is differentiable on a CPU too."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("sharing", [None, "cla2-keep-ends", "interleaved"])
def test_packed_documents_equal_the_documents_alone(sharing, implementation, documents, uncompiled):
    some = model(sharing, implementation)
    ids, positions = packed(documents)
    with torch.inference_mode():
        together = hidden_states(some, ids, positions)
        alone = torch.stack([torch.cat([hidden_states(some, d[None])[0] for d in row]) for row in documents])
        unmasked = hidden_states(some, ids)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)  # eager attention has a softmax in float32
    assert (unmasked - alone).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["mistral-window", "gemma2", "gemma3", "llama-odd"])
def test_flex_attention_honours_windows_and_soft_caps(case, documents, uncompiled):
    """Gemma 2 caps its scores; three query heads for each of K/V are no power of two."""
    some = cla_model(case, None).double()
    ids, positions = packed(documents)
    with torch.inference_mode():
        expected = hidden_states(some, ids, positions)
        some.set_attn_implementation("flex_attention")
        torch.testing.assert_close(hidden_states(some, ids, positions), expected, rtol=1e-4, atol=1e-4)


def test_flex_attention_is_taken_on_a_gpu_where_the_model_can(monkeypatch):
    def chosen(some, device_type: str) -> str:
        skip_other_documents(some, device_type)
        return some.config._attn_implementation

    monkeypatch.setattr("cla_convert.training.objective.find_spec", lambda _: None)  # no Triton
    assert chosen(cla_model("llama", None), "cuda") == "sdpa"
    monkeypatch.setattr("cla_convert.training.objective.find_spec", lambda _: object())
    dropping = cla_model("llama", None, attention_dropout=0.1)
    assert chosen(dropping, "cuda") == chosen(cla_model("gpt_bigcode", None), "cuda") == "sdpa"
    assert chosen(cla_model("llama", None), "cpu") == "sdpa"
    assert chosen(cla_model("llama", None), "cuda") == "flex_attention"
    assert chosen(source_model("gemma2"), "cuda") == "flex_attention"


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@pytest.mark.parametrize(("loss", "checkpointing"), [("cross_entropy", False), ("distill", True)])
def test_the_loss_and_its_gradient_are_those_of_the_documents_alone(
    loss, checkpointing, implementation, documents, uncompiled
):
    student = model("cla2-keep-ends", implementation).train()
    teacher = model(None, implementation, seed=1) if loss == "distill" else None
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
