"""What uptraining a model takes on each of so many GPUs, from configs alone: to plan with, before there is any GPU."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..models.export import cla_config
from ..models.source import open_headers
from ..recipe import Recipe, Train
from ..training.layout import Layout
from ..training.memory import CONTEXT, Forecast, Needs
from .sharing import sharing_map
from .supported import check_convertible

GPUS = (1, 2, 8, 16, 64)
ON_A_MACHINE = 8
_KEPT = {False: "kept", True: "recomputed"}
_WHOLE = {False: "whole", True: "sharded"}


@dataclass(frozen=True)
class Demand:
    """What one way of training takes on each GPU."""

    gpus: int
    parameters: str
    recomputed: bool
    """Whether activations are (`train.activation_checkpointing`)."""
    sharded_teacher: bool
    needs: Needs

    @property
    def bytes(self) -> int:
        """All of it."""
        return round(self.needs.peak + CONTEXT)

    def to_json(self) -> dict[str, Any]:
        """As `inspect --json` has it."""
        return {
            "gpus": self.gpus,
            "parameters": self.parameters,
            "activation_checkpointing": self.recomputed,
            "teacher": _WHOLE[self.sharded_teacher],
            "bytes_per_gpu": self.bytes,
            "parts": {name: round(size) for name, size in self.needs.parts.items()},
        }


@dataclass(frozen=True)
class Capacity:
    """The ways of training a model, and what each takes."""

    train: Train
    demands: list[Demand]

    def to_json(self) -> dict[str, Any]:
        """As `inspect --json` has it."""
        assumed = {"sequence_length": self.train.sequence_length, "micro_batch_size": self.train.micro_batch_size}
        return {**assumed, "memory": [demand.to_json() for demand in self.demands]}

    def render(self) -> str:
        """A table for a person."""
        numbers = list(dict.fromkeys(demand.gpus for demand in self.demands))
        rows: dict[tuple[str, str, str], dict[int, str]] = {}
        for one in self.demands:
            row = (one.parameters, _KEPT[one.recomputed], _WHOLE[one.sharded_teacher] if one.needs.teacher else "-")
            rows.setdefault(row, {})[one.gpus] = f"{one.bytes / 2**30:.1f}"
        lines = [
            f"training    GiB on each of so many GPUs, in passes of {self.train.micro_batch_size} x "
            f"{self.train.sequence_length} tokens, {self.train.precision}; foreseen, not measured",
            f" {'trained':<10}{'activations':<12}{'teacher':<7}" + "".join(f"{number:>6}" for number in numbers),
        ]
        for (trained, activations, teacher), cells in rows.items():
            line = "".join(f"{cells.get(number, '-'):>6}" for number in numbers)
            lines.append(f" {trained:<10}{activations:<12}{teacher:<7}{line}")
        return "\n".join(lines)


def capacity_of(model: str, recipe: Recipe, *, revision: str | None = None, gpus: Sequence[int] = GPUS) -> Capacity:
    """What training `model` by the recipe takes, whatever the recipe says of what is varied here.

    Raises InputError, UsageError if it cannot be converted so.
    """
    pickled = recipe.source.allow_pickle
    checkpoint = open_headers(model, revision=revision, allow_pickle=pickled)
    family, shape, *_ = check_convertible(checkpoint)
    wanted = "cla2-keep-ends" if recipe.convert.sharing == "auto" else recipe.convert.sharing  # about as large
    student = cla_config(checkpoint.config, family, sharing_map(wanted, shape.kinds), "bfloat16")
    named = recipe.train.teacher
    teacher = open_headers(named, allow_pickle=pickled).config if named else checkpoint.config
    train = _assumed(recipe.train, max(gpus))
    return Capacity(train, list(demands(train, student, teacher, sorted(set(gpus)))))


def demands(
    train: Train, student: Mapping[str, Any], teacher: Mapping[str, Any], gpus: Sequence[int]
) -> Iterator[Demand]:
    """Every way of training, on every number of GPUs. Raises UsageError if one of them cannot be divided so."""
    assert isinstance(train.micro_batch_size, int), "`auto` asks a GPU"
    for parameters, recomputed in product(("all", "attention"), (False, True)):
        settings = train.model_copy(update={"parameters": parameters, "activation_checkpointing": recomputed})
        # A run of any length is compiled; this machine need not be able to.
        forecast = Forecast(settings.model_copy(update={"compile": False}), student, teacher, "cuda")
        forecast.compiled = train.compile is not False
        for divided, number in product((False, True), gpus):
            if divided and (number == 1 or not train.needs_teacher):
                continue
            layout = Layout.of(train, number, min(number, ON_A_MACHINE)).with_teacher(divided=divided)
            needs = forecast.among(layout).needs(train.micro_batch_size)
            yield Demand(number, parameters, recomputed, divided, needs)


def _assumed(train: Train, most: int) -> Train:
    """The settings with what only a GPU would tell, and batches that keep the most GPUs busy for two passes a step."""
    rows = 1 if train.micro_batch_size == "auto" else train.micro_batch_size
    batch = max(train.batch_tokens, 2 * most * rows * train.sequence_length)
    if train.precision == "auto":
        train = train.model_copy(update={"precision": "bfloat16"})
    return train.model_copy(
        update={"micro_batch_size": rows, "batch_tokens": batch, "tokens": max(train.tokens, 2 * batch)}
    )
