"""The frozen model to distil from: checked against the student, loaded in the compute dtype, sharing what it can."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..console import human_bytes, say
from ..errors import InputError
from ..models.checkpoint import Checkpoint
from ..models.export import load_model, load_tokenizer
from ..models.shape import positions_of
from ..models.tokenization import segmentation_difference
from ..recipe import Train
from .objective import check_head


def check_teacher(train: Train, student: Path, teacher: Path) -> None:
    """Raise InputError if the model in folder `teacher` cannot teach the one in `student`: vocabulary, width, length.

    Reads tokenizers and configs only. Nothing to check without distillation.
    """
    if not train.needs_teacher:
        return
    ours, theirs = (Checkpoint.open(folder).config for folder in (student, teacher))
    one, other = load_tokenizer(student), load_tokenizer(teacher)
    _check_vocabulary(one.get_vocab(), other.get_vocab())
    if found := segmentation_difference(one, other):
        raise InputError(
            "The teacher cuts text otherwise than the model to train",
            why=f"{found[0].upper()}{found[1:]}.",
            fix="Convert the source again if it is the teacher; or distil from a model with the same tokenizer.",
        )
    matched = train.hidden_weight != "auto" and train.hidden_weight > 0
    for name, words in (("hidden_size", "channels"), ("num_hidden_layers", "layers")):
        if matched and ours.get(name) != theirs.get(name):
            raise InputError(
                "The residual streams of student and teacher cannot be matched: their sizes differ",
                f"The student has {ours.get(name)} {words}, the teacher {theirs.get(name)}.",
                "Leave train.hidden_weight out, or distil from the source model.",
            )
    longest = positions_of(theirs)
    if longest and train.sequence_length > longest:
        raise InputError(
            f"train.sequence_length is {train.sequence_length}, more than the teacher's {longest} positions"
        )


def _check_vocabulary(ours: dict[str, int], theirs: dict[str, int]) -> None:
    """The teacher may know more tokens, and its embedding may be padded to another size; ours it must number alike."""
    different = sorted((number, token) for token, number in ours.items() if theirs.get(token) != number)
    if different:
        number, token = different[0]
        raise InputError(
            "The teacher has another vocabulary than the model to train",
            f"{len(different)} of {len(ours)} tokens differ, such as {token!r}: {number} against {theirs.get(token)}.",
            "Distil from the source model, or from another one with its tokenizer (train.teacher).",
        )


def load_teacher(folder: Path, student: nn.Module, *, dtype: torch.dtype, device: str) -> Any:
    """Load a teacher for inference on `device`; frozen weights of the student that are bit-identical are one copy."""
    teacher: Any = load_model(folder, dtype=dtype).requires_grad_(False)
    if shared := share_frozen(student, teacher):
        say(f"teacher and student share {human_bytes(shared)} of frozen weights")
    teacher.to(device)
    check_head(teacher)
    return teacher


@torch.no_grad()
def share_frozen(student: nn.Module, teacher: nn.Module) -> int:
    """Let the teacher use the student's frozen weights where both hold the same bits; returns the bytes saved."""
    frozen = {name: p for name, p in student.named_parameters() if not p.requires_grad}
    saved = 0
    for name, parameter in teacher.named_parameters():
        mine = frozen.get(name)
        if mine is None or mine.dtype != parameter.dtype or mine.shape != parameter.shape:
            continue
        if torch.equal(mine, parameter.to(mine.device)):
            parameter.data = mine.data
            saved += mine.nbytes
    return saved
