"""Everything a step needs, made once: models, data, optimiser, and what was derived from the settings."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..amounts import passes
from ..console import human_count, say
from ..errors import InputError
from ..models.checkpoint import Checkpoint
from ..models.export import load_tokenizer
from ..models.fingerprint import fingerprint
from ..models.scoring import check_ids
from ..models.self_test import check_interface
from ..models.shape import positions_of
from ..models.tokenization import check_as_recorded
from ..preflight import check_packing
from ..recipe import FREE, Recipe, Train
from .compiling import choose_compile, compile_layers
from .data import Sequences, TokenStore, check_enough, held_out_rows, say_passes, store_for
from .derived import derived
from .flops import peak_flops, training_flops
from .layout import Layout
from .memory import Forecast
from .micro_batch import forecast, loading
from .objective import STREAM_DISTANCE, Objective, check_documents, check_head
from .optimizer import freeze_all_but, make_optimizer, parts_trained, peak_rate
from .parallel import Team
from .precision import Precision, cast_frozen, choose_precision
from .rates import with_rates
from .schedule import Budget
from .sharded import release, run_gathered
from .teacher import check_teacher, fill_models
from .trackers import check_trackers
from .weights import Unfilled


@dataclass
class Trainer:
    """Everything a step needs; made once by `set_up`."""

    settings: Train
    budget: Budget
    device: str
    precision: Precision
    student: Any
    objective: Objective
    optimizers: tuple[torch.optim.Optimizer, ...]
    sequences: Sequences
    validation: torch.Tensor
    """Held-out rows [n, T]."""
    data: TokenStore
    seed: int
    team: Team
    micro_batch: int
    """Sequences in a forward and backward pass."""
    forecast: Forecast
    """Of the memory that all of this needs."""
    compiled: bool
    flops_per_token: float
    """Of training, see flops.py."""
    peak_flops: float | None
    """FLOP/s of the device; None where it is not known."""

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """Trained parameters by name; tied ones appear once."""
        return {name: p for name, p in self.student.named_parameters() if p.requires_grad}

    def utilisation(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation (MFU) at this speed; None where the device's peak is not known."""
        return None if self.peak_flops is None else tokens_per_second * self.flops_per_token / self.peak_flops

    def computing(self) -> AbstractContextManager[None]:
        """Context of a step's passes: weights in the compute dtype. FSDP2 casts what it gathers by itself."""
        return self.precision.working_copy(self.student) if self.team.size == 1 else self.precision.products()


def set_up(
    student_dir: Path,
    teacher_dir: Path,
    recipe: Recipe,
    device: str,
    team: Team = Team(),  # noqa: B008  (immutable)
    text: Callable[[], TokenStore] | None = None,
    data: TokenStore | None = None,
) -> Trainer:
    """Load models and data, and say what was derived. Raises InputError.

    The data are what `text` gives, or else what the recipe names; or `data`, and then nothing is checked.
    """
    budget = Budget.of(recipe.train)
    student = Checkpoint.open(student_dir).config
    check_interface(student.get("model_type", ""))
    check_packing(recipe, student)
    check_trackers(recipe.train.log_to)
    if data is None:
        check_as_recorded(student_dir)
        check_teacher(recipe.train, student_dir, teacher_dir)
        with team.leader_first():
            data = text() if text else store_for(recipe, load_tokenizer(student_dir), teacher_dir, device)
        check_enough(data, recipe.train)
        say_passes(data, budget.tokens)
    precision = choose_precision(recipe.train.precision, device)
    configs = [Checkpoint.open(folder).config for folder in (student_dir, teacher_dir)]
    foreseen, rows = alike(
        team, *forecast(recipe.train, configs[0], configs[1], device, Layout(team.size, team.shards))
    )
    torch.manual_seed(recipe.seed)
    with loading():
        unfilled = _student(student_dir, recipe.train, data, precision, device)
        source = _teacher(teacher_dir, recipe.train, data, precision, device)
    student, teacher = unfilled.model, source and source.model
    settings = derived(recipe.train, student.config, teacher and teacher.config)
    flops = training_flops(student, teacher, budget.length)
    compiled = choose_compile(settings.compile, precision.device_type, flops * budget.tokens)
    objective = Objective(settings, student, teacher, fused=compiled)
    for model in filter(None, (student, teacher)):
        if compiled:
            compile_layers(model, len(team.share(0, budget.batch, rows)[0]), budget.length)
    with loading():  # before the optimiser, which is to hold the sharded parameters
        fill_models(unfilled, source, team, precision.compute, foreseen.layout)
    settings = with_rates(settings, student)
    peak = peak_flops(device, precision.compute)
    trainer = Trainer(
        settings=settings,
        budget=budget,
        device=device,
        precision=precision,
        student=student,
        objective=objective,
        optimizers=(make_optimizer(student, settings, precision.device_type),),
        sequences=_sequences(data, settings, recipe.seed),
        validation=torch.from_numpy(held_out_rows(data, settings)),
        data=data,
        seed=recipe.seed,
        team=team,
        micro_batch=rows,
        forecast=foreseen,
        compiled=compiled,
        flops_per_token=flops,
        peak_flops=peak and peak * team.size,
    )
    _check_models(trainer)
    say(_describe(trainer))
    return trainer


def alike(team: Team, foreseen: Forecast, rows: int) -> tuple[Forecast, int]:
    """A forecast and the sequences in a pass with which every process fits: machines may have other GPUs."""
    layout = foreseen.layout.with_teacher(divided=team.any(foreseen.layout.teacher_shards > 1))
    layout = replace(layout, gathers_once=not team.any(not layout.gathers_once))
    return foreseen.among(layout), min(team.collect(rows))


def run_identity(student_dir: Path, teacher_dir: Path, recipe: Recipe, trainer: Trainer) -> dict[str, Any]:
    """What the weights at the end depend on: a checkpoint resumes only a run that agrees in all of it."""
    free = {name for name, field in Train.model_fields.items() if FREE in field.metadata}
    settings = trainer.settings.model_dump(mode="json", exclude=free)
    settings |= {"compile": trainer.compiled}  # what `auto` came to; micro-batches add up alike however they are cut
    return {
        **{f"train.{name}": value for name, value in settings.items()},
        "train.precision": trainer.precision.name,  # what `auto` came to
        **({"train.hidden_distance": STREAM_DISTANCE} if trainer.objective.hidden_weight else {}),
        "seed": recipe.seed,
        "data": trainer.data.digest,
        "model": fingerprint(student_dir),
        "teacher": fingerprint(teacher_dir) if recipe.train.needs_teacher else None,
        "device": trainer.precision.device_type,
    }


def _sequences(data: TokenStore, settings: Train, seed: int) -> Sequences:
    starts = data.starts if settings.document_masking else None
    return Sequences(data.train, settings.sequence_length, seed, starts=starts, first=data.first)


def _student(folder: Path, settings: Train, data: TokenStore, precision: Precision, device: str) -> Unfilled:
    """The model to train, in training mode: what is trained in float32, the rest frozen and in the compute dtype."""
    unfilled = Unfilled(folder, dtype=torch.float32, device=device)
    student: Any = unfilled.model
    _check_fit(student, data, settings)
    freeze_all_but(student, settings.parameters)
    cast_frozen(student, precision.compute)
    student.train()
    without_dropout(student)
    if settings.activation_checkpointing:
        # Reentrant checkpointing gives silently wrong gradients for K/V that travel between layers.
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return unfilled


def without_dropout(model: torch.nn.Module) -> None:
    """Set every dropout of a model to 0. A budget of tokens is seen about once, and a student that drops activations
    cannot give what its teacher gives: some configurations (StarCoder2, Granite 3) still ask for it.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(module, torch.nn.Dropout))):
                setattr(module, name, 0.0)


def _teacher(folder: Path, settings: Train, data: TokenStore, precision: Precision, device: str) -> Unfilled | None:
    """The model to distil from, if the loss needs one."""
    if not settings.needs_teacher:
        return None
    unfilled = Unfilled(folder, dtype=precision.compute, device=device)
    _check_rows(unfilled.model, data, "teacher")
    unfilled.model.requires_grad_(False)
    return unfilled


def _check_models(trainer: Trainer) -> None:
    """Raise InputError if the loss does not know how one of the models makes its logits, or where documents end."""
    checks = [check_head, *([check_documents] if trainer.settings.document_masking else [])]
    for check in checks:
        if (teacher := trainer.objective.teacher) is not None:
            run_gathered(check, teacher)
            release(teacher)
        with trainer.computing():
            trainer.team.run(check, trainer.student)
        release(trainer.student)


def _check_rows(model: Any, data: TokenStore, which: str = "model") -> None:
    """Raise InputError if the text has tokens beyond a model's embedding."""
    check_ids(model, torch.tensor([int(side.max()) for side in (data.train, data.held_out) if side.size]), which)


def _check_fit(student: Any, data: TokenStore, settings: Train) -> None:
    _check_rows(student, data)
    longest = positions_of(student.config.to_dict())
    if longest and settings.sequence_length > longest:
        raise InputError(
            f"train.sequence_length is {settings.sequence_length}, more than the model's {longest} positions"
        )


def rates_told(settings: Train) -> str:
    """Those of what is trained, by their parts where they differ."""
    rates = {part: peak_rate(part, settings) for part in parts_trained(settings.parameters)}
    if len(set(rates.values())) == 1:
        return f"learning rate {rates['shared']:g}"
    if rates["shared"] == rates["attention"]:
        del rates["shared"]  # a part of it
    names = {"other": "the rest"}
    return f"learning rate {', '.join(f'{rate:g} {names.get(part, part)}' for part, rate in rates.items())}"


def text_seen(sequences: int, prepared: int, length: int) -> str:
    """How often training sees its text: not all that there is, but the part that was prepared for the budget."""
    return f"{passes(sequences / prepared)} over the {human_count(prepared * length)} tokens prepared of the text"


def _describe(trainer: Trainer) -> str:
    budget, count = trainer.budget, sum(p.numel() for p in trainer.parameters.values())
    where = trainer.device if trainer.team.size == 1 else f"{trainer.team.size} x {trainer.precision.device_type}"
    if trainer.forecast.layout.gathers_once:
        where += ", the model gathered once a step"
    skipped = not trainer.compiled and trainer.settings.compile == "auto" and trainer.precision.device_type == "cuda"
    compute = trainer.precision.name + ("" if trainer.precision.compute is torch.float32 else " over float32 weights")
    return (
        f"uptraining: {budget.steps} steps of {budget.batch} x {budget.length} tokens, {human_count(budget.tokens)} in "
        f"all, {text_seen(budget.sequences, trainer.sequences.count, budget.length)}, "
        f"{trainer.micro_batch} sequences a pass; {human_count(count)} parameters trained; "
        f"{trainer.settings.loss}; {rates_told(trainer.settings)}; {compute} on {where}; "
        + ("layers and loss are compiled in the first step" if trainer.compiled else "not compiled")
        + (" (auto: too short to pay it back)" if skipped else "")
    )
