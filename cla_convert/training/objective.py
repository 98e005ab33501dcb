"""What is minimised: an objective maps the student and a micro-batch to a scalar.

KL says at the end of the model that something is wrong; the distance of residual streams from the teacher's, behind
every layer, says in which one. Each layer's targets are the teacher's own, so that far fewer tokens settle what a layer
has to do (TinyBERT, arXiv 1909.10351, section 3.1).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from ..models.families import decoder_layers
from ..models.scoring import evaluating, hidden_states, output_head
from ..recipe import Train
from .loss import IGNORE, LogitRule, Target, Terms, logit_rule, next_token_labels, vocabulary_loss
from .sharded import own_rows, release, run_gathered
from .train_loss import LOSSES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_LOGIT_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""Memory for the float32 logits of one chunk: small enough for a CPU's allocator to reuse, large enough for a GPU."""


STREAM_DISTANCE = "over the longer of both"
"""What `stream_distance` is relative to; until November 2026 it was the teacher's stream."""


class Objective:
    """The terms of `train.loss`, and agreement of the hidden states with a teacher's, weighted and added."""

    def __init__(
        self, train: Train, student: "PreTrainedModel", teacher: "PreTrainedModel | None" = None, *, fused: bool = False
    ) -> None:
        """Read the weights of the terms.

        Args:
            train: the recipe's section, `derived`.
            student: the model to train.
            teacher: for a loss that needs one; of the student's width where hidden states are matched.
            fused: compile what happens to a chunk of logits.
        """
        loss = LOSSES.named(train.loss)
        self.teacher, self.fused = teacher, fused
        matched = loss.needs_teacher and train.hidden_weight != "auto"
        self.hidden_weight = float(train.hidden_weight) if matched else 0.0
        self.terms = Terms(
            parts=tuple((term, weight) for term, weight in loss.terms(train) if weight),
            temperature=train.temperature,
            rule=logit_rule(student.config),
            teacher_rule=LogitRule() if teacher is None else logit_rule(teacher.config),
        )
        self.parts = [term.name for term, _ in self.terms.parts] + ["hidden"] * bool(self.hidden_weight)
        """Names of the terms that are computed."""

    def __call__(
        self,
        student: "PreTrainedModel",
        ids: torch.Tensor,
        positions: torch.Tensor | None,
        denominator: float,
        done: float = 0.0,
        rows: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a micro-batch [B, T] in nats, summed over its targets and divided by `denominator`.

        `positions` [B, T] start from 0 in each document and keep documents apart; None: one text. `done` is the share
        of the budget that is spent: the weight of the hidden states falls with it, because they are the way and not
        the goal. Kept to the end they cost perplexity; let go they do not. Sequences behind the first `rows` only fill
        the shape that the layers are compiled for, and count for nothing.

        Returns:
            What is to be differentiated; and for the record [1 + len(parts)] the loss without the hidden states, whose
            falling weight would look like progress, and the `parts` without their weights.
        """
        followed = self.teacher if self.hidden_weight else None
        with recorded_streams(student) if followed is not None else nullcontext([]) as streams:
            hidden = hidden_states(student, ids, positions)
        with recorded_streams(followed) if followed is not None else nullcontext([]) as targets:
            target = None if self.teacher is None else run_gathered(_target, self.teacher, ids, positions)
        labels, weight = next_token_labels(ids, positions), head_weight(student)
        labels[len(ids) if rows is None else rows :] = IGNORE
        if target is not None and len(target.weight) != len(weight):  # padded differently: compare what both have
            words = min(len(weight), len(target.weight))
            target, weight = target._replace(weight=target.weight[:words]), weight[:words]
        loss, sums = vocabulary_loss(
            hidden, weight, labels, self.terms, teacher=target, chunk=chunk_size(weight), fused=self.fused
        )
        if self.teacher is not None:
            release(self.teacher)
        record = [loss.detach(), *sums]
        if followed is not None:
            distance = stream_distance(streams, targets, labels != IGNORE, fused=self.fused)
            loss = loss + (1 - done) * self.hidden_weight * distance
            record.append(distance.detach())
        return loss / denominator, torch.stack(record) / denominator


def _target(teacher: "PreTrainedModel", ids: torch.Tensor, positions: torch.Tensor | None) -> Target:
    with torch.no_grad():
        return Target(hidden_states(teacher, ids, positions), head_weight(teacher))


@contextmanager
def recorded_streams(model: "PreTrainedModel") -> Iterator[list[Tensor]]:
    """The residual stream [B, T, D] behind every layer of the forward passes made inside, in order."""
    streams: list[Tensor] = []

    def keep(_layer: Any, _inputs: Any, output: Any) -> None:
        streams.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in decoder_layers(model)]
    try:
        yield streams
    finally:
        for hook in hooks:
            hook.remove()


def stream_distance(
    streams: Sequence[Tensor], targets: Sequence[Tensor], counted: Tensor, *, fused: bool = False
) -> Tensor:
    """|stream - target|^2 / max(|stream|^2, |target|^2), averaged over layers and summed over the counted positions.

    A position that draws attention to itself has a stream a hundred times as long as the others ("massive activations",
    arXiv 2402.17762). Where the student makes one and the teacher does not, the square of that length over the
    teacher's outweighs a whole batch, and after clipping it is all that the step follows (docs/measurements.md). Over
    the longer of both, which is a constant for the gradient, no position counts for more than 4.

    Args:
        streams: [B, T, D] behind each layer of the student.
        targets: of the teacher, likewise.
        counted: bool [B, T].
        fused: compile it.
    """
    distance = _compiled() if fused else _distance
    total = torch.stack([distance(*pair, counted) for pair in zip(streams, targets, strict=True)])
    return total.mean()


def _distance(stream: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    stream, target = stream.float(), target.float()
    mine, theirs = stream.detach().square().sum(-1), target.square().sum(-1)
    each = (stream - target).square().sum(-1) / torch.maximum(mine, theirs).clamp_min(1e-12)
    return (each * counted).sum()


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_distance, dynamic=False)


def head_weight(model: "PreTrainedModel") -> torch.Tensor:
    """The output embedding [V, D]. Raises InputError for a head that is more than a matrix."""
    head = output_head(model)
    if head.bias is not None:
        raise InputError("Models whose output head has a bias cannot be uptrained yet")
    return head.weight


@torch.no_grad()
def check_head(model: "PreTrainedModel") -> None:
    """Raise InputError unless hidden states, output embedding and `LogitRule` give the logits of the model itself."""
    ids = torch.arange(8, device=model.device)[None]
    with evaluating(model):
        logits = model(input_ids=ids, use_cache=False).logits.float()
        mine = logit_rule(model.config).apply(hidden_states(model, ids) @ head_weight(model).T)
    if not logits.isfinite().all():
        lost = [name for name, weight in model.named_parameters() if not own_rows(weight).isfinite().all()]
        named = f"NaN or infinity in {', '.join(lost[:3])}{', ...' if lost[3:] else ''}." if lost else ""
        raise InputError(
            f"A model of type {model.config.model_type!r} computes what is no number",
            named or "Its weights are finite; this device or number format overflows.",
            "Check the weights of the model to train and of its teacher, or download them again." if lost else "",
        )
    if not torch.allclose(mine, logits, rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
        raise InputError(
            f"Models of type {model.config.model_type!r} cannot be uptrained yet",
            "Their logits are more than a product with the output embedding, a scale and a soft cap.",
        )


@torch.no_grad()
def check_documents(model: "PreTrainedModel") -> None:
    """Raise InputError unless attention of the model sees one document only where positions begin anew.

    Not every model of transformers tells its mask of the positions (GPT-OSS in 5.23 does not).
    """
    ids = torch.arange(32, device=model.device)[None] % model.config.get_text_config().vocab_size
    positions = torch.arange(16, device=model.device).repeat(2)[None]
    with evaluating(model):
        behind = hidden_states(model, ids, positions)[:, 16:].float()
        alone = hidden_states(model, ids[:, 16:]).float()
    if not torch.allclose(behind, alone, rtol=5e-2, atol=5e-2 * float(alone.abs().max())):
        raise InputError(
            f"train.document_masking does nothing to models of type {model.config.model_type!r}",
            "The installed transformers lets their attention see earlier documents of a row all the same.",
            "Leave train.document_masking out.",
        )


def chunk_size(weight: torch.Tensor, device_type: str = "") -> int:
    """Positions whose logits exist at a time: a power of two, so that chunks of usual batches are of one shape.

    `device_type` stands for the weight's own device.
    """
    fit = _LOGIT_BYTES.get(device_type or weight.device.type, 2**28) // (4 * weight.shape[0])
    return 1 << max(4, fit.bit_length() - 1)
