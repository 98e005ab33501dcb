"""Chunked losses against the naive ones, in float64 where the comparison is about the formula."""

import pytest
import torch
import torch.nn.functional as F

from cla_convert.training.loss import IGNORE, LogitRule, cross_entropy, distill, logit_rule, next_token_labels

B, T, D, V = 3, 11, 16, 37
RULES = [LogitRule(), LogitRule(scale=0.25), LogitRule(softcap=2.0), LogitRule(scale=3.0, softcap=5.0)]


def tensors(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden, teacher_hidden = torch.randn(2, B, T, D, generator=generator)
    weight, teacher_weight = torch.randn(2, V, D, generator=generator)
    ids = torch.randint(0, V, (B, T), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight, ids


def naive_logits(hidden: torch.Tensor, weight: torch.Tensor, rule: LogitRule) -> torch.Tensor:
    logits = hidden @ weight.T * rule.scale
    return logits if rule.softcap is None else torch.tanh(logits / rule.softcap) * rule.softcap


def gradients(loss: torch.Tensor, *of: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, of))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("rule", RULES)
def test_cross_entropy_equals_the_naive_loss_and_its_gradients(chunk: int, rule: LogitRule) -> None:
    hidden, weight, _, _, ids = tensors()
    labels = next_token_labels(ids)
    labels[1, 2:6] = IGNORE
    naive = F.cross_entropy(naive_logits(hidden, weight, rule).flatten(0, 1), labels.flatten(), reduction="sum") / 20
    chunked = cross_entropy(hidden, weight, labels, chunk, denominator=20, rule=rule)
    torch.testing.assert_close(chunked, naive, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients(chunked, hidden, weight), gradients(naive, hidden, weight), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("masked", [False, True])
def test_distill_equals_the_naive_kl_and_its_gradients(chunk: int, rule: LogitRule, masked: bool) -> None:
    hidden, weight, teacher_hidden, teacher_weight, ids = tensors()
    mask = (ids % 3 > 0) if masked else None
    teacher_rule = LogitRule(softcap=3.0)
    log_q = F.log_softmax(naive_logits(teacher_hidden, teacher_weight, teacher_rule), -1)
    log_p = F.log_softmax(naive_logits(hidden, weight, rule), -1)
    each = (log_q.exp() * (log_q - log_p)).sum(-1)
    naive = (each if mask is None else each[mask]).sum() / 7
    chunked = distill(
        hidden, teacher_hidden, weight, teacher_weight, mask, chunk, denominator=7, rule=rule, teacher_rule=teacher_rule
    )
    torch.testing.assert_close(chunked, naive, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients(chunked, hidden, weight), gradients(naive, hidden, weight), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_distilling_a_model_from_itself_costs_nothing() -> None:
    hidden, weight, *_ = tensors()
    loss = distill(hidden, hidden.detach(), weight, weight.detach(), None, 8)
    assert abs(loss.item()) < 1e-5
    assert all(g.abs().max() < 1e-5 for g in gradients(loss, hidden, weight))


def test_a_tied_weight_gets_both_gradients() -> None:
    _, weight, _, _, ids = tensors()
    chunked = cross_entropy(F.embedding(ids, weight), weight, next_token_labels(ids), 5)
    naive = F.cross_entropy(
        (F.embedding(ids, weight) @ weight.T)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    (mine,), (theirs,) = gradients(chunked, weight), gradients(naive, weight)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, _, _, ids = tensors()
    cross_entropy(hidden, weight.detach(), next_token_labels(ids), 5).backward()
    assert hidden.grad is not None and weight.grad is None


def test_bfloat16_autocast_keeps_the_softmax_and_the_sums_in_float32() -> None:
    hidden, weight, _, _, ids = tensors()
    exact = cross_entropy(hidden, weight, next_token_labels(ids), 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = cross_entropy(hidden, weight, next_token_labels(ids), 5)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=1e-2, atol=0)
    (mine,), (theirs,) = gradients(rough, weight), gradients(exact, weight)
    assert mine.dtype == torch.float32
    assert F.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0) > 0.999


def test_only_a_chunk_of_logits_exists_at_a_time() -> None:
    hidden, weight, teacher_hidden, teacher_weight, _ = tensors()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and V in out.shape and D not in out.shape:
                largest = max(largest, out.numel())
            return out

    with Watch():
        distill(hidden, teacher_hidden, weight, teacher_weight, None, 4).backward()
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
