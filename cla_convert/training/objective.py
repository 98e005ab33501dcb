"""What is minimised. An objective maps the student and a micro-batch to a scalar; a new loss is a new class here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import InputError
from ..models.export import load_model
from ..recipe import Train
from .loss import IGNORE, cross_entropy, distill, logit_rule, next_token_labels
from .precision import Precision

_LOGIT_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""Memory for the float32 logits of one chunk: small enough for a CPU's allocator to reuse, large enough for a GPU."""


class Objective(Protocol):
    """A loss on packed sequences."""

    def targets(self, length: int) -> int:
        """Predictions that a sequence of `length` tokens is scored on."""
        ...

    def __call__(
        self, student: Any, ids: torch.Tensor, denominator: float, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Loss of a micro-batch [B, T], summed over its targets and divided by `denominator`.

        `positions` [B, T] start from 0 in each document and keep documents apart; None: one text.
        """
        ...


class CrossEntropy:
    """Next-token cross-entropy on the data."""

    def targets(self, length: int) -> int:
        """Every token but the first is predicted."""
        return length - 1

    def __call__(
        self, student: Any, ids: torch.Tensor, denominator: float, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Nats per predicted token."""
        weight = head_weight(student)
        return cross_entropy(
            hidden_states(student, ids, positions),
            weight,
            next_token_labels(ids, positions),
            chunk_size(weight),
            denominator=denominator,
            rule=logit_rule(student.config),
        )


class Distillation:
    """Forward KL from a frozen teacher at temperature 1."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def targets(self, length: int) -> int:
        """As many as cross-entropy has, so that the two losses count the same tokens."""
        return length - 1

    def __call__(
        self, student: Any, ids: torch.Tensor, denominator: float, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Nats per predicted token."""
        with torch.inference_mode(), torch.autocast(ids.device.type, enabled=False):
            teacher_hidden = hidden_states(self.teacher, ids, positions)
        weight = head_weight(student)
        return distill(
            hidden_states(student, ids, positions),
            teacher_hidden,
            weight,
            head_weight(self.teacher),
            next_token_labels(ids, positions) != IGNORE,
            chunk_size(weight),
            denominator=denominator,
            rule=logit_rule(student.config),
            teacher_rule=logit_rule(self.teacher.config),
        )


def make_objective(train: Train, student: Any, teacher_dir: Path, precision: Precision, device: str) -> Objective:
    """The recipe's objective; loads the teacher, in the compute dtype, where there is one."""
    makers: dict[str, Callable[[], Objective]] = {
        "cross_entropy": CrossEntropy,
        "distill": lambda: Distillation(_load_teacher(teacher_dir, student, precision, device)),
    }
    return makers[train.loss]()


def hidden_states(model: Any, ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """Final hidden states [B, T, D] of tokens [B, T], without the vocabulary projection.

    Without a mask and a cache, transformers (masking_utils.find_packed_sequence_indices) takes every restart of
    `position_ids` [B, T] for a new document and lets attention see that document only.
    """
    return model.base_model(input_ids=ids, position_ids=position_ids, use_cache=False).last_hidden_state


def head_weight(model: Any) -> torch.Tensor:
    """The output embedding [V, D]. Raises InputError for a head that is more than a matrix."""
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise InputError("Models whose output head has a bias cannot be uptrained yet")
    return head.weight


def chunk_size(weight: torch.Tensor) -> int:
    """Positions whose logits exist at a time."""
    return max(16, _LOGIT_BYTES.get(weight.device.type, 2**28) // (4 * weight.shape[0]))


def _load_teacher(folder: Path, student: Any, precision: Precision, device: str) -> Any:
    # Weights in the compute dtype: nothing is cast per step, and the copy takes half the memory.
    teacher = load_model(folder, dtype=precision.compute, device=device).eval().requires_grad_(False)
    ours, theirs = head_weight(student).shape[0], head_weight(teacher).shape[0]
    if ours != theirs:
        raise InputError(
            "The teacher has another vocabulary than the model to train",
            f"{theirs} tokens against {ours}.",
            "Distil from the source model, or from another one with its tokenizer.",
        )
    return teacher
