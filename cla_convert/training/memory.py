"""Memory of training, foreseen from the configs: what fits is computed before a weight is read.

The peak of a step on one device is the larger of two moments.

    in a pass     weights + moments + teacher + copy + activations + what one layer or the loss needs at a time
                  (+ accumulated gradients, from the second pass of a step on)
    at its end    weights + moments + teacher + copy + gradients + gradients of the copy

    weights       4 bytes a trained parameter (float32), what is frozen in the compute dtype
    moments       8 bytes a trained parameter (optimizer.py)
    gradients     4 bytes a trained parameter
    copy          the trained parameters in the compute dtype (precision.py)
    teacher       all its parameters in the compute dtype, but what it shares with the student (teacher.py)
    activations   what autograd keeps, counted on the meta device (rehearsal.py), and the teacher's residual streams
                  where the student follows them (objective.py)

Several processes divide weights, moments and gradients by their number, or that of a `Layout`'s shards, and a teacher
if it is to be. Instead of a copy they gather, in the compute dtype, what lies outside of layers and a layer or two, and
reduce gradients in float32 (parallel.py): `Gathered` has what exists when. Where a step gathers once, the copy is
whole, and so are gradients from the second pass on. Beside a whole teacher, the student's frozen weights that are the
teacher's are whole as well, and nothing gathers them.
"""

from collections.abc import Callable, Collection, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from ..console import human_bytes, warn
from ..models.families import decoder_layers
from ..recipe import Train
from .compiling import choose_compile
from .derived import derived
from .flops import training_flops
from .layout import Layout
from .objective import Objective, chunk_size
from .optimizer import freeze_all_but
from .precision import choose_precision
from .rehearsal import kept_bytes, loss_bytes, skeleton
from .schedule import Budget
from .weights import twins

CONTEXT = 1_000_000_000
"""Of the driver, cuBLAS and NCCL on a GPU; Python, torch and transformers on a CPU."""


@dataclass(frozen=True)
class Needs:
    """Bytes on one device, by what they are for."""

    weights: float
    moments: float
    gradients: float
    copy: float
    teacher: float
    activations: float
    at_a_time: float
    """What one layer or the loss needs beside what is kept."""
    accumulated: float
    """Gradients of a step's earlier passes."""
    copied_gradients: float

    @property
    def peak(self) -> float:
        """The most that tensors need at a time."""
        always = self.weights + self.moments + self.teacher + self.copy
        in_a_pass = always + self.accumulated + self.activations + self.at_a_time
        return max(in_a_pass, always + self.gradients + self.copied_gradients)

    @property
    def parts(self) -> dict[str, float]:
        """By the names that people know; not all are there at the same time."""
        return {
            "weights": self.weights + self.copy,
            "optimiser": self.moments,
            "gradients": max(self.gradients, self.accumulated),
            "teacher": self.teacher,
            "activations": self.activations + self.at_a_time,
        }

    def __str__(self) -> str:
        return ", ".join(f"{name} {human_bytes(size)}" for name, size in self.parts.items() if size)


@dataclass(frozen=True)
class Gathered:
    """Bytes that several processes gather or reduce at a time, by moments of a pass."""

    always: float = 0
    """What lies outside of the student's layers; all of it where a step gathers once."""
    in_a_layer: float = 0
    """Of the backward pass: two layers, the gradients of one."""
    in_the_loss: float = 0
    """A layer, and what lies outside of the teacher's."""
    at_the_end: float = 0
    """Gradients of what lies outside of layers."""


class Forecast:
    """What training one model needs, for any number of sequences a pass."""

    def __init__(
        self,
        train: Train,
        student: Mapping[str, Any],
        teacher: Mapping[str, Any] | None,
        device: str,
        layout: Layout = Layout(),  # noqa: B008  (immutable)
    ) -> None:
        """Build both models without numbers.

        Args:
            train: the recipe's section.
            student: config.json of the model to train.
            teacher: config.json of the model to distil from; None without one.
            device: `cpu`, `cuda`, ...
            layout: of the run's processes.
        """
        self.device, self.layout = device, layout
        self.configs = student, teacher
        self.budget = Budget.of(train)
        self.precision = choose_precision(train.precision, device)
        self.student = self._built(student)
        freeze_all_but(self.student, train.parameters)
        self.teacher = None if teacher is None or not train.needs_teacher else self._built(teacher)
        self.train = derived(train, self.student.config, self.teacher and self.teacher.config)
        flops = training_flops(self.student, self.teacher, self.budget.length)
        self.compiled = choose_compile(train.compile, self.precision.device_type, flops * self.budget.tokens)

    def given(self, **changes: Any) -> "Forecast":
        """The same training with other settings."""
        return Forecast(self.train.model_copy(update=changes), *self.configs, self.device, self.layout)

    def among(self, layout: Layout) -> "Forecast":
        """The same training by other processes."""
        other = copy(self)  # what is kept of a sequence was counted already
        other.layout = layout
        return other

    def needs(self, rows: int) -> Needs:
        """Bytes with so many sequences a pass."""
        trained, frozen = self._counts
        size, share, alone = self._size, 1 / self.layout.shards, self.layout.processes == 1
        activations, layer = self._activations(rows)
        streams, differences = self._followed(rows)
        copied = size * trained if size < 4 else 0
        once, passes = self.layout.gathers_once, -(-self.budget.batch // (self.layout.processes * rows))
        gathered = Gathered() if alone else self._gathered
        return Needs(
            weights=(4 * trained + size * (frozen - _count(self._left_out))) * share,
            moments=8 * trained * share,
            gradients=4 * trained * share,
            copy=copied if alone else gathered.always,
            teacher=self._teacher,
            activations=activations + streams,
            at_a_time=max(layer + differences + gathered.in_a_layer, self._loss(rows) + gathered.in_the_loss),
            accumulated=0 if passes == 1 else 4 * trained * (1 if once else share),
            copied_gradients=copied if alone else gathered.at_the_end,
        )

    def describe(self, rows: int) -> str:
        """For a person: the peak and its parts."""
        needs, each = self.needs(rows), " on each device" if self.layout.processes > 1 else ""
        return (
            f"about {human_bytes(needs.peak + CONTEXT)} of memory{each} with {rows} sequences a pass: {needs}, "
            f"libraries {human_bytes(CONTEXT)}"
        )

    def largest(self, room: float, most: int) -> int:
        """The largest power of two of sequences a pass, at most `most`, whose needs stay within `room`; 0 for none."""
        fit, rows = 0, 1
        while rows <= most and self.needs(rows).peak + CONTEXT <= room:
            fit, rows = rows, 2 * rows
        return fit

    def _built(self, config: Mapping[str, Any]) -> Any:
        """Weights in the compute dtype, as passes see them; buffers as they are."""
        model = skeleton(config)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.precision.compute)
        return model

    @property
    def _size(self) -> int:
        return self.precision.compute.itemsize

    @cached_property
    def _counts(self) -> tuple[int, int]:
        parameters = list(self.student.parameters())
        trained = _count(p for p in parameters if p.requires_grad)
        return trained, _count(parameters) - trained

    @property
    def _teacher(self) -> float:
        """Bytes of the teacher, but what the student has: whole, or a part of it."""
        if self.teacher is None:
            return 0
        own = _count(self.teacher.parameters()) - _count(self._shared) + _count(self._left_out)
        return self._size * own / self.layout.teacher_shards

    @property
    def _left_out(self) -> Collection[nn.Parameter]:
        """Parameters of the student that several processes have whole, as the teacher's (teacher.fill_models)."""
        return () if self.layout.processes == 1 or self.layout.teacher_shards > 1 else self._shared

    @cached_property
    def _shared(self) -> Collection[nn.Parameter]:
        """Parameters of the student that are the teacher's, too: as far as a config tells, all that may be."""
        return set() if self.teacher is None else {ours for _, ours, _ in twins(self.student, self.teacher)}

    @property
    def _gathered(self) -> Gathered:
        """What several processes gather and reduce. The head's gradient waits for the end of a pass."""
        left_out, size, reducing = self._left_out, self._size, 4 + self._size
        outside, layer = _outside_and_largest(self.student, lambda parameter: parameter not in left_out)
        trained_outside, trained_layer = _outside_and_largest(self.student, lambda parameter: parameter.requires_grad)
        head = self.student.get_output_embeddings().weight
        waiting = head.numel() if head.requires_grad else 0
        divided = self.teacher is not None and self.layout.teacher_shards > 1
        teachers = _outside_and_largest(self.teacher, lambda _: True)[0] if divided else 0
        if self.layout.gathers_once:
            return Gathered(
                always=size * _count(p for p in self.student.parameters() if p not in left_out),
                in_a_layer=size * waiting + reducing * trained_layer,
                in_the_loss=size * teachers,
                at_the_end=reducing * trained_outside,
            )
        return Gathered(
            always=size * outside,
            in_a_layer=size * (2 * layer + waiting) + reducing * trained_layer,
            in_the_loss=size * (layer + teachers),
            at_the_end=reducing * trained_outside,
        )

    @cached_property
    def _kept(self) -> float:
        """Bytes that all layers keep for a sequence."""
        documents = self.train.document_masking
        try:
            return kept_bytes(self.student, self.budget.length, compiled=self.compiled, documents=documents)
        except (RuntimeError, NotImplementedError) as error:  # it looks at numbers, of which there are none
            warn(f"memory of training: a rough bound, the model cannot be rehearsed ({str(error).splitlines()[0]})")
            return self.budget.length * _bound(self.student.config)

    def _activations(self, rows: int) -> tuple[float, float]:
        """Bytes that are kept, and bytes that the layer at work needs: the gradients of what it has kept."""
        layers = self.student.config.num_hidden_layers
        kept = rows * self._kept
        if not self.train.activation_checkpointing:
            return kept, kept / layers
        inputs = self._size * rows * self.budget.length * self.student.config.hidden_size * layers
        return inputs, 2 * kept / layers  # made anew, then its gradients

    def _followed(self, rows: int) -> tuple[float, float]:
        """The teacher's streams; and, after the loss, their differences from the student's in float32.

        A compiler fuses the latter away.
        """
        config = self.student.config
        channels = rows * self.budget.length * config.hidden_size * config.num_hidden_layers
        followed = channels if self.train.hidden_weight else 0
        return self._size * followed, 0 if self.compiled else 4 * followed

    def _loss(self, rows: int) -> float:
        head = self.student.get_output_embeddings().weight
        terms = Objective(self.train, self.student, self.teacher).terms
        chunk = chunk_size(head, self.precision.device_type)
        return loss_bytes(
            head, rows * self.budget.length, terms, chunk, teacher=self.teacher is not None, compiled=self.compiled
        )


def _bound(config: Any) -> int:
    """Bytes that a token keeps, at most: measured on a Llama that is not compiled."""
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size  # GPT-2's way to leave it out
    return config.num_hidden_layers * (40 * config.hidden_size + 10 * inner)


def _outside_and_largest(model: Any, counts: Callable[[nn.Parameter], bool]) -> tuple[int, int]:
    """Parameters that lie outside of layers, and those of the largest layer; of those that count."""

    def count(module: Any) -> int:
        return _count(filter(counts, module.parameters()))

    layers = [count(layer) for layer in decoder_layers(model)]
    return count(model) - sum(layers), max(layers)


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)
