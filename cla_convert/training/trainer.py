"""Everything a step needs, made once: models, data, optimiser, and what was derived from the settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..console import human_count, say
from ..errors import InputError
from ..models.checkpoint import Checkpoint
from ..models.export import load_model, load_tokenizer
from ..recipe import Recipe, Train
from .data import Sequences, TokenStore, held_out_rows, store_for
from .objective import Objective, make_objective
from .parallel import Team
from .precision import Precision, choose_precision
from .schedule import Budget

# Settings that change what is written when, but not one weight: free to change on resume.
_FREE = {"checkpoint_every", "control", "keep_checkpoints", "keep_checkpoints_after_success", "validate_every"}


@dataclass
class Trainer:
    """Everything a step needs; made once by `set_up`."""

    settings: Train
    budget: Budget
    device: str
    precision: Precision
    student: Any
    objective: Objective
    optimizer: torch.optim.Optimizer
    sequences: Sequences
    validation: torch.Tensor
    """Held-out rows [n, T]."""
    data: TokenStore
    seed: int
    team: Team

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """Trained parameters by name; tied ones appear once."""
        return {name: p for name, p in self.student.named_parameters() if p.requires_grad}


def set_up(
    student_dir: Path,
    teacher_dir: Path,
    recipe: Recipe,
    device: str,
    team: Team = Team(),  # noqa: B008  (immutable)
) -> Trainer:
    """Load models and data, and say what was derived from the settings. Raises InputError."""
    settings, budget = recipe.train, Budget.of(recipe.train)
    if not budget.sequences:
        raise InputError(
            f"The budget of {settings.tokens} tokens is smaller than one sequence of {settings.sequence_length}",
            fix="Raise train.tokens or lower train.sequence_length.",
        )
    with team.leader_first():
        data = store_for(recipe, load_tokenizer(student_dir), teacher_dir, device)
    precision = choose_precision(settings.precision, device)
    torch.manual_seed(recipe.seed)
    student: Any = load_model(student_dir, dtype=torch.float32, device=device if team.size == 1 else "cpu")
    _check_fit(student, data, settings)
    objective = make_objective(settings, student, teacher_dir, precision, device)
    student.train()
    if settings.activation_checkpointing:
        # Reentrant checkpointing gives silently wrong gradients for K/V that travel between layers.
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    team.shard(student)  # before the optimiser, which is to hold the sharded parameters
    trainer = Trainer(
        settings=settings,
        budget=budget,
        device=device,
        precision=precision,
        student=student,
        objective=objective,
        optimizer=_optimizer(student, settings, precision.device_type),
        sequences=Sequences(
            data.train, settings.sequence_length, recipe.seed, starts=data.starts if settings.document_masking else None
        ),
        validation=torch.from_numpy(held_out_rows(data, settings)),
        data=data,
        seed=recipe.seed,
        team=team,
    )
    say(_describe(trainer))
    return trainer


def run_identity(student_dir: Path, teacher_dir: Path, recipe: Recipe, trainer: Trainer) -> dict[str, Any]:
    """What the weights at the end depend on: a checkpoint resumes only a run that agrees in all of it."""
    settings = recipe.train.model_dump(mode="json", exclude=_FREE)
    return {
        **{f"train.{name}": value for name, value in settings.items()},
        "train.precision": trainer.precision.name,  # what `auto` came to
        "seed": recipe.seed,
        "data": trainer.data.digest,
        "model": Checkpoint.open(student_dir).fingerprint(),
        "teacher": Checkpoint.open(teacher_dir).fingerprint() if recipe.train.loss == "distill" else None,
        "device": trainer.precision.device_type,
    }


def _optimizer(student: Any, settings: Train, device_type: str) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only (norms and biases have no scale to decay)."""
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = device_type in ("cpu", "cuda")  # one pass over the parameters instead of a dozen
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=fused)


def _check_fit(student: Any, data: TokenStore, settings: Train) -> None:
    rows = student.get_input_embeddings().weight.shape[0]
    highest = max(int(side.max()) for side in (data.train, data.held_out) if side.size)
    if highest >= rows:
        raise InputError("The tokenizer is not the model's", f"It gives token {highest}; the model knows {rows}.")
    longest = getattr(student.config, "max_position_embeddings", None)
    if longest and settings.sequence_length > longest:
        raise InputError(
            f"train.sequence_length is {settings.sequence_length}, more than the model's {longest} positions"
        )


def _describe(trainer: Trainer) -> str:
    budget, count = trainer.budget, sum(p.numel() for p in trainer.parameters.values())
    where = trainer.device if trainer.team.size == 1 else f"{trainer.team.size} x {trainer.precision.device_type}"
    passes = budget.sequences / trainer.sequences.count
    compute = trainer.precision.name + ("" if trainer.precision.compute is torch.float32 else " over float32 weights")
    return (
        f"uptraining: {budget.steps} steps of {budget.batch} x {budget.length} tokens, {human_count(budget.tokens)} in "
        f"all, {passes:.2g} passes over the text; {human_count(count)} parameters trained; {trainer.settings.loss}; "
        f"{compute} on {where}"
    )
