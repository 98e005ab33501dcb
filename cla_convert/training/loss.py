"""Losses over the vocabulary, in chunks of positions: the whole batch's logits never exist, forward or backward.

Cross-entropy and the forward KL divergence have the same gradient with respect to the student's logits, p_student -
p_target, where the target is the next token or the teacher's distribution. So each chunk of positions computes its
logits, its losses and, at once, its part of the gradients: three matrix products, against four with recomputation. What
stays until the backward pass has the size of the hidden states and of the head, not of the logits.

The matrix products run in the dtype of the hidden states, softmax and sums in float32. What lies between the products
is one function, `chunk_loss`, which torch.compile fuses into two passes over the logits.

Shapes: B sequences, T positions, N = B*T, D hidden size, V vocabulary. Position t holds what predicts token t+1, so
labels are aligned with the *predicting* position: `next_token_labels`.
"""

from collections.abc import Callable
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .train_loss import Chunk, Term

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


class Terms(NamedTuple):
    """A loss over the vocabulary: the sum of weighted terms, on logits as the models define them."""

    parts: tuple[tuple[Term, float], ...]
    temperature: float = 1.0
    rule: LogitRule = LogitRule()
    teacher_rule: LogitRule = LogitRule()

    @property
    def fusible(self) -> bool:
        """Whether torch.compile can take all of it."""
        return all(term.fusible for term, _ in self.parts)


class Target(NamedTuple):
    """Where the teacher's distribution comes from."""

    hidden: torch.Tensor
    """Final hidden states [B, T, D']; no gradient flows into them."""
    weight: torch.Tensor
    """Output embedding [V, D']."""


def next_token_labels(ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Labels of the predicting positions: [B, T] -> [B, T], the last position ignored.

    With `positions` [B, T], which start from 0 in each document, no document predicts the first token of the next one.
    """
    following = ids[:, 1:] if positions is None else ids[:, 1:].masked_fill(positions[:, 1:] == 0, IGNORE)
    return torch.cat((following, torch.full_like(ids[:, :1], IGNORE)), dim=1)


def vocabulary_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    terms: Terms,
    *,
    teacher: Target | None = None,
    chunk: int,
    fused: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss that `terms` describe, summed over the positions whose label is not IGNORE.

    Args:
        hidden: the student's final hidden states [B, T, D].
        weight: its output embedding [V, D].
        labels: the token that each position predicts [B, T], see `next_token_labels`.
        terms: the weights of the two losses, the temperature, scale and soft cap of the logits.
        teacher: needed where a term compares with one.
        chunk: positions whose logits may exist at a time.
        fused: compile what happens to a chunk of logits.

    Returns:
        The weighted sum, a float32 scalar, differentiable in `hidden` and `weight`; and every term, summed but not
        weighted, for the record.
    """
    function = _compiled(terms) if fused and terms.fusible else partial(chunk_loss, terms=terms)
    states = None if teacher is None else teacher.hidden.detach().flatten(0, 1)
    head = None if teacher is None else teacher.weight.detach()
    return _Chunked.apply(hidden.flatten(0, 1), weight, states, head, labels.flatten(), terms, chunk, function)


def chunk_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, terms: Terms
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of n positions and the gradient of their weighted sum.

    Args:
        logits: products of the student's states and head [n, V], before the model's rule.
        teacher_logits: the teacher's [n, V], likewise.
        labels: [n]; IGNOREd positions count for nothing in the losses (their gradient is the caller's to drop).
        terms: what is computed.

    Returns:
        The sum of every term in float32, and the gradient with respect to `logits`, in their dtype.
    """
    capped = terms.rule.apply(logits)
    teacher = None if teacher_logits is None else terms.teacher_rule.apply(teacher_logits)
    chunk = Chunk(capped, teacher, labels, labels != IGNORE, terms.temperature)
    sums, gradients = zip(*(term(chunk, weight) for term, weight in terms.parts), strict=True)
    gradient = terms.rule.backward(reduce(torch.add, gradients), capped)
    return torch.stack(sums), gradient.to(logits.dtype)


class _Divergence:
    """T^2 KL(teacher || model, both at temperature T).

    T^2 keeps the gradient's size when T changes (Hinton et al. 2015, arXiv 1503.02531, section 2.1).
    """

    name, fusible = "kl", True

    def __call__(self, chunk: Chunk, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        assert chunk.teacher is not None, "KL needs a teacher"
        t = chunk.temperature
        log_q, log_p = _log_softmax(chunk.teacher, t), _log_softmax(chunk.logits, t)
        q = log_q.exp()
        kl = (torch.linalg.vecdot(q, log_q.sub_(log_p)) * chunk.counted).sum() * t**2
        return kl, _scale(log_p.exp_().sub_(q), weight * t)


class _CrossEntropy:
    """Of the next token; at temperature 1, whatever the recipe's."""

    name, fusible = "cross_entropy", True

    def __call__(self, chunk: Chunk, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = _log_softmax(chunk.logits, 1.0)
        target = chunk.labels.clamp(min=0)[:, None]
        entropy = -(log_p.gather(-1, target).squeeze(-1) * chunk.counted).sum()
        return entropy, _scale(_minus_one_at(log_p.exp_(), target), weight)


KL: Term = _Divergence()
CROSS_ENTROPY: Term = _CrossEntropy()


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return F.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def _scale(gradient: torch.Tensor, factor: float) -> torch.Tensor:
    """In place, and not at all where nothing changes: what is not compiled reads all logits once more for it."""
    return gradient if factor == 1.0 else gradient.mul_(factor)


def _minus_one_at(p: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """p [n, V] less one at `target` [n, 1]: a scatter in place, or a comparison, which a compiler can fuse."""
    if torch.compiler.is_compiling():
        return torch.where(torch.arange(p.shape[1], device=p.device) == target, p - 1, p)
    return p.scatter_add_(-1, target, p.new_full((), -1.0).expand_as(target))


ChunkLoss = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@cache
def _compiled(terms: Terms) -> ChunkLoss:
    def fused(logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor) -> Any:
        return chunk_loss(logits, teacher_logits, labels, terms)

    return torch.compile(fused, fullgraph=True)


class _Chunked(torch.autograd.Function):
    """Sum of a loss over chunks of positions; the gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        teacher_hidden: torch.Tensor | None,
        teacher_weight: torch.Tensor | None,
        labels: torch.Tensor,
        terms: Terms,
        chunk: int,
        function: ChunkLoss,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        head = weight.to(hidden.dtype)
        sums = torch.zeros(len(terms.parts), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        # In float32 whatever the dtype of the weight: a sum over chunks must not lose what bfloat16 drops.
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            counted = (labels[part] != IGNORE)[:, None]
            states = hidden[part]
            target = None
            if teacher_hidden is not None and teacher_weight is not None:
                target = teacher_hidden[part].to(teacher_weight.dtype) @ teacher_weight.T
            losses, gradient = function(states @ head.T, target, labels[part])
            sums += losses
            if d_hidden is not None:
                d_hidden[part] = gradient @ head * counted
            if d_weight is not None:
                _add_product(d_weight, gradient.T, states * counted)
        ctx.gradients = d_hidden, None if d_weight is None else d_weight.to(weight.dtype)
        ctx.mark_non_differentiable(sums)
        return reduce(torch.add, (total * weight for total, (_, weight) in zip(sums, terms.parts, strict=True))), sums

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factor, scaled = gradients[0], ctx.gradients
        ctx.gradients = None
        return *(None if g is None else g.mul_(factor) for g in scaled), None, None, None, None, None, None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left @ right`, the product in the dtype of its factors."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
