"""Chunked losses over hidden states: the whole batch's logits never exist, in forward or in backward.

Both losses have the same gradient with respect to the student's logits, p_student - p_target, where the target is the
next token (cross-entropy) or the teacher's distribution (forward KL). So each chunk of positions computes its logits,
its loss and, at once, its part of the gradients: three matrix products, against four with recomputation. What stays
until the backward pass has the size of the hidden states and of the head, not of the logits.

Shapes: B sequences, T positions, N = B*T, D hidden size, V vocabulary. Position t holds what predicts token t+1, so
labels and masks are aligned with the *predicting* position: `next_token_labels`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

IGNORE = -100
"""Label of a position that predicts nothing."""


class LogitRule(NamedTuple):
    """What a family does to its logits after the head: `softcap * tanh(scale * x / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits as the model defines them, float32 [n, V]."""
        logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def backward(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Gradient before the rule, from the gradient after it and the logits after it."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap) ** 2)
        return gradient if self.scale == 1.0 else gradient * self.scale


def logit_rule(config: Any) -> LogitRule:
    """Read the rule from a model's config: Gemma 2 caps, Granite divides, Cohere multiplies."""
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return LogitRule(float(scale), getattr(config, "final_logit_softcapping", None))


def next_token_labels(ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Labels of the predicting positions: [B, T] -> [B, T], the last position ignored.

    With `positions` [B, T], which start from 0 in each document, no document predicts the first token of the next one.
    """
    following = ids[:, 1:] if positions is None else ids[:, 1:].masked_fill(positions[:, 1:] == 0, IGNORE)
    return torch.cat((following, torch.full_like(ids[:, :1], IGNORE)), dim=1)


def cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    chunk: int,
    *,
    denominator: float = 1.0,
    rule: LogitRule = LogitRule(),  # noqa: B008  (immutable)
) -> torch.Tensor:
    """Cross-entropy summed over the labels that are not IGNORE, divided by `denominator`.

    Args:
        hidden: final hidden states [B, T, D].
        weight: the output embedding [V, D].
        labels: the token that each position predicts [B, T], see `next_token_labels`.
        chunk: positions whose logits exist at a time.
        denominator: usually the predicted tokens of the whole optimiser step.
        rule: scale and soft cap of the logits.

    Returns:
        A scalar, float32, differentiable in `hidden` and `weight`.
    """
    keep, wanted = _select(labels != IGNORE, labels)

    def chunk_loss(logits: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        target = wanted[part, None]
        log_p = F.log_softmax(logits, dim=-1)
        loss = -log_p.gather(-1, target).sum()
        gradient = log_p.exp_().scatter_add_(-1, target, log_p.new_full((), -1.0).expand_as(target))
        return loss, gradient

    return _apply(hidden, weight, keep, chunk_loss, chunk, rule) / denominator


def distill(
    hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_weight: torch.Tensor,
    mask: torch.Tensor | None,
    chunk: int,
    *,
    denominator: float = 1.0,
    rule: LogitRule = LogitRule(),  # noqa: B008  (immutable)
    teacher_rule: LogitRule = LogitRule(),  # noqa: B008  (immutable)
) -> torch.Tensor:
    """Forward KL(teacher || student) at temperature 1, summed over the mask, divided by `denominator`.

    Args:
        hidden: the student's final hidden states [B, T, D].
        teacher_hidden: the teacher's [B, T, D']; no gradient flows into it.
        weight: the student's output embedding [V, D].
        teacher_weight: the teacher's [V, D'].
        mask: positions that count, bool [B, T]; None: all.
        chunk: positions whose logits exist at a time.
        denominator: usually the predicted tokens of the whole optimiser step.
        rule: scale and soft cap of the student's logits.
        teacher_rule: the teacher's.

    Returns:
        A scalar, float32, differentiable in `hidden` and `weight`.
    """
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    keep, target_hidden = _select(mask, teacher_hidden.detach())

    def chunk_loss(logits: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        teacher = teacher_rule.apply(target_hidden[part].to(teacher_weight.dtype) @ teacher_weight.detach().T)
        log_q = F.log_softmax(teacher, dim=-1)
        log_p = F.log_softmax(logits, dim=-1)
        q = log_q.exp()
        loss = (q * log_q.sub_(log_p)).sum()
        return loss, log_p.exp_().sub_(q)

    return _apply(hidden, weight, keep, chunk_loss, chunk, rule) / denominator


def _select(mask: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Indices [n] of the positions that count (None: all) and `values` there, [n] or [n, D']."""
    flat = values.flatten(0, 1)
    if bool(mask.all()):
        return None, flat
    keep = mask.flatten().nonzero().squeeze(-1)
    return keep, flat[keep]


ChunkLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""(logits [n, V] after the rule, the chunk's slice of the positions) -> (summed loss, gradient of it [n, V])."""


def _apply(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    keep: torch.Tensor | None,
    chunk_loss: ChunkLoss,
    chunk: int,
    rule: LogitRule,
) -> torch.Tensor:
    flat = hidden.flatten(0, 1)
    flat = flat if keep is None else flat[keep]
    return _Chunked.apply(flat, weight, chunk_loss, chunk, rule)


class _Chunked(torch.autograd.Function):
    """Sum of a loss over chunks of positions; the gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, chunk_loss: ChunkLoss, chunk: int, rule: LogitRule
    ) -> torch.Tensor:
        device = hidden.device.type
        # The products run in the dtype autocast asks for, the softmax and all sums in float32.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        head = weight.detach().to(dtype)
        total = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight: torch.Tensor | None = None
        with torch.autocast(device, enabled=False):
            for start in range(0, hidden.shape[0], chunk):
                part = slice(start, start + chunk)
                states = hidden[part].detach().to(dtype)
                logits = rule.apply(states @ head.T)
                loss, gradient = chunk_loss(logits, part)
                total += loss
                gradient = rule.backward(gradient, logits).to(dtype)
                if d_hidden is not None:
                    d_hidden[part] = gradient @ head
                if need_weight:
                    d_weight = _accumulate(d_weight, gradient, states, weight.dtype)
        ctx.gradients = d_hidden, d_weight
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None
        (factor,) = gradients
        return (
            None if d_hidden is None else d_hidden.mul_(factor),
            None if d_weight is None else d_weight.mul_(factor),
            None,
            None,
            None,
        )


def _accumulate(
    total: torch.Tensor | None, gradient: torch.Tensor, states: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`total + gradient.T @ states`, in the dtype of the weight: sums over chunks must not lose what bfloat16 drops."""
    if total is None:
        return (gradient.T @ states).to(dtype)
    if states.dtype == dtype:
        return total.addmm_(gradient.T, states)
    return total.add_(gradient.T @ states)
