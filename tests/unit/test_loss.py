"""Chunked losses against the naive ones, fused and plain."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from cla_convert.training.loss import (
    CROSS_ENTROPY,
    IGNORE,
    KL,
    LogitRule,
    Target,
    Terms,
    logit_rule,
    next_token_labels,
    vocabulary_loss,
)

B, T, D, V = 3, 11, 16, 37
RULES = [LogitRule(), LogitRule(scale=0.25), LogitRule(softcap=2.0), LogitRule(scale=3.0, softcap=5.0)]
NEXT, DIVERGENCE = Terms(((CROSS_ENTROPY, 1.0),)), Terms(((KL, 1.0),))
MIXED = Terms(((KL, 0.7), (CROSS_ENTROPY, 0.2)), temperature=3.0, rule=RULES[3], teacher_rule=RULES[2])


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, Target, torch.Tensor]:
    """Hidden states, head, teacher, labels of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, B, T, D, generator=generator).to(dtype)
    weight, teacher_weight = torch.randn(2, V, D, generator=generator).to(dtype)
    labels = next_token_labels(torch.randint(0, V, (B, T), generator=generator))
    labels[1, 2:6] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), Target(teacher_hidden, teacher_weight), labels


def naive_logits(hidden: torch.Tensor, weight: torch.Tensor, rule: LogitRule) -> torch.Tensor:
    logits = hidden @ weight.T * rule.scale
    return logits if rule.softcap is None else torch.tanh(logits / rule.softcap) * rule.softcap


def naive(
    hidden: torch.Tensor, weight: torch.Tensor, teacher: Target, labels: torch.Tensor, terms: Terms
) -> torch.Tensor:
    logits, t = naive_logits(hidden, weight, terms.rule), terms.temperature
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE)
    log_q = F.log_softmax(naive_logits(teacher.hidden, teacher.weight, terms.teacher_rule) / t, -1)
    log_p = F.log_softmax(logits / t, -1)
    kl = F.kl_div(log_p[labels != IGNORE], log_q[labels != IGNORE], log_target=True, reduction="sum") * t**2
    values = {KL: kl, CROSS_ENTROPY: cross_entropy}
    return torch.stack([values[term] * weight for term, weight in terms.parts]).sum()


def assert_same(terms: Terms, chunk: int, fused: bool = False) -> None:
    hidden, weight, teacher, labels = tensors()
    loss, sums = vocabulary_loss(hidden, weight, labels, terms, teacher=teacher, chunk=chunk, fused=fused)
    expected = naive(hidden, weight, teacher, labels, terms)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        sum(part * weight for part, (_, weight) in zip(sums, terms.parts, strict=True)), loss.detach()
    )
    mine, theirs = (torch.autograd.grad(value / 20, (hidden, weight)) for value in (loss, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("rule", RULES)
def test_cross_entropy_equals_the_naive_loss_and_its_gradients(chunk: int, rule: LogitRule) -> None:
    assert_same(NEXT._replace(rule=rule), chunk)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_distillation_equals_the_naive_loss_and_its_gradients(chunk: int, rule: LogitRule, temperature: float) -> None:
    assert_same(DIVERGENCE._replace(rule=rule, teacher_rule=LogitRule(softcap=3.0), temperature=temperature), chunk)


def test_the_mixture_of_both_equals_the_naive_loss_and_its_gradients() -> None:
    assert_same(MIXED, chunk=7)


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_fused_losses_are_the_same(compiler: None) -> None:
    assert_same(MIXED, chunk=11, fused=True)


def test_distilling_a_model_from_itself_costs_nothing() -> None:
    hidden, weight, _, labels = tensors()
    loss, _ = vocabulary_loss(hidden, weight, labels, DIVERGENCE, teacher=Target(hidden, weight), chunk=8)
    assert abs(loss.item()) < 1e-5
    assert all(g.abs().max() < 1e-5 for g in torch.autograd.grad(loss, (hidden, weight)))


def test_a_tied_weight_gets_both_gradients() -> None:
    weight, ids = tensors()[1], torch.arange(B * T).view(B, T)
    labels = next_token_labels(ids)
    chunked, _ = vocabulary_loss(F.embedding(ids, weight), weight, labels, NEXT, chunk=5)
    expected = naive(F.embedding(ids, weight), weight, tensors()[2], labels, NEXT)
    (mine,), (theirs,) = torch.autograd.grad(chunked, weight), torch.autograd.grad(expected, weight)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, _, labels = tensors()
    vocabulary_loss(hidden, weight.detach(), labels, NEXT, chunk=5)[0].backward()
    assert hidden.grad is not None and weight.grad is None


def test_bfloat16_keeps_the_softmax_and_the_sums_in_float32() -> None:
    exact = vocabulary_loss(*tensors()[:2], tensors()[3], NEXT, chunk=1)
    hidden, weight, _, labels = tensors(torch.bfloat16)
    rough = vocabulary_loss(hidden, weight, labels, NEXT, chunk=1)
    assert rough[0].dtype == rough[1].dtype == torch.float32
    torch.testing.assert_close(rough[0], exact[0], rtol=1e-2, atol=0)
    # A thousand equal chunks: summed in bfloat16, everything after the first 256 or so would be lost.
    thousand, single = (
        torch.autograd.grad(
            vocabulary_loss(hidden[:1].repeat(1, n, 1), weight, labels[:1].repeat(1, n), NEXT, chunk=T)[0],
            weight,
        )[0].float() / n
        for n in (1000, 1)
    )  # fmt: skip
    assert (thousand - single).norm() < 0.01 * single.norm()


def test_only_a_chunk_of_logits_exists_at_a_time() -> None:
    hidden, weight, teacher, labels = tensors()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and V in out.shape and D not in out.shape:
                largest = max(largest, out.numel())
            return out

    with Watch():
        vocabulary_loss(hidden, weight, labels, MIXED, teacher=teacher, chunk=4)[0].backward()
    assert 0 < largest <= 4 * V


def test_labels_are_those_of_the_next_token() -> None:
    labels = next_token_labels(torch.tensor([[5, 6, 7]]))
    assert labels.tolist() == [[6, 7, IGNORE]]


def test_logit_rules_are_read_from_the_config() -> None:
    class Config:
        logits_scaling = 8.0
        final_logit_softcapping = 30.0

    assert logit_rule(Config()) == LogitRule(scale=0.125, softcap=30.0)
    assert logit_rule(object()) == LogitRule()
