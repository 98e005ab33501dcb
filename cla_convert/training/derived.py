"""What `hidden_weight: auto` comes to once the models are known."""

from typing import Any

from ..recipe import Train

HIDDEN_WEIGHT = 30.0


def derived(train: Train, student: Any, teacher: Any) -> Train:
    """`train` with a number for `hidden_weight`; the evidence for it is in docs/uptraining.md.

    Args:
        train: the recipe's section.
        student: config of the model to train.
        teacher: config of the teacher; None without one.
    """
    if train.hidden_weight != "auto":
        return train
    same = teacher is not None and all(
        getattr(student, name) == getattr(teacher, name) for name in ("num_hidden_layers", "hidden_size")
    )
    return train.model_copy(update={"hidden_weight": HIDDEN_WEIGHT if same and train.needs_teacher else 0.0})
