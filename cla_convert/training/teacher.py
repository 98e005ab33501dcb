"""The frozen model to distil from: checked against the student, and loaded with it, sharing what it can."""

from pathlib import Path

import torch
from torch import nn

from ..console import human_bytes, say
from ..errors import InputError
from ..models.checkpoint import Checkpoint
from ..models.export import load_tokenizer
from ..models.shape import positions_of
from ..models.tokenization import segmentation_difference
from ..recipe import Train
from .layout import Layout
from .parallel import Team
from .weights import Unfilled


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


def fill_models(student: Unfilled, teacher: Unfilled | None, team: Team, compute: torch.dtype, layout: Layout) -> None:
    """Shard both models over the team as the layout has it, and read their weights.

    Weights of the student that are frozen and the teacher's too are one copy, of which each process has its rows where
    the teacher is sharded, and all where it is whole.

    Raises:
        InputError: weights cannot be read, or the teacher is to be sharded and is quantised.
    """
    shared: dict[str, nn.Parameter] = {}
    shard_teacher, once = layout.teacher_shards > 1, layout.gathers_once
    if teacher is not None:
        if teacher.quantised and shard_teacher:
            raise InputError(
                "The teacher's weights are quantised and cannot be divided among processes",
                fix="Set train.shard_teacher=false, or distil from the model as it was before quantisation.",
            )
        if shard_teacher:
            team.shard(teacher.model, compute)
            team.shard(student.model, compute, once=once)
        teacher.fill()
        shared = student.adopt(teacher.model)
    if teacher is None or not shard_teacher:
        team.shard(student.model, compute, whole=shared.values(), once=once)
    student.fill()
    if shared:
        say(f"teacher and student share {human_bytes(sum(p.nbytes for p in shared.values()))} of frozen weights")
