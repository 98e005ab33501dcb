"""The end of uptraining: its result, and the model."""

from pathlib import Path
from typing import Any

import torch

from ..console import say, warn
from ..environment import peak_memory_bytes
from ..models.checkpoint import Checkpoint
from ..models.export import export_model
from ..results import TrainResult
from .state import Position
from .trainer import Trainer


def publish(trainer: Trainer, student_dir: Path, out: Path, result: TrainResult, identity: dict[str, Any]) -> None:
    """Say what training did, and write the model: whole or not at all. All processes must ask; the first one writes."""
    state = _final_weights(trainer, student_dir)
    _tell(result.validation)
    if trainer.team.leads:
        manifest = {"uptraining": result.to_json() | identity}
        say(f"writing the model to {out}")
        export_model(state, student_dir, out, manifest=manifest, overwrite=True)


def result_of(
    trainer: Trainer, position: Position, rows: list[dict[str, Any]], changes: list[dict[str, Any]]
) -> TrainResult:
    """What train.json says; `rows` are those of metrics.jsonl, `changes` what was changed in mid-run."""
    found = {
        "tokens": position.tokens,
        "steps": position.step,
        "seconds": position.seconds,
        "tokens_per_second": position.tokens / position.seconds,
        "mfu": trainer.utilisation(position.tokens / position.seconds),
        "compiled": trainer.compiled,
        "objective": trainer.settings.loss,
        "learning_rate": trainer.settings.learning_rate,  # what `auto` came to, as of the parts
        "learning_rates": trainer.settings.learning_rates,
        "loss": position.loss,
        "first_loss": position.first_loss,
        "validation": [row for row in rows if "validation_perplexity" in row],
        "parameters_trained": sum(p.numel() for p in trainer.parameters.values()),
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "expected_memory_bytes": round(trainer.forecast.needs(trainer.micro_batch).peak),
        "device": trainer.device,
        "processes": trainer.team.size,
        "precision": trainer.precision.name,
        "data_digest": trainer.data.digest,
        "data": trainer.data.info,
        "changes": changes,
    }
    return TrainResult.model_validate(found)


def _final_weights(trainer: Trainer, student_dir: Path) -> dict[str, torch.Tensor]:
    """The state dict to export, on process 0. What was not trained comes from the files: in memory it is cast."""
    if trainer.team.size > 1:
        return trainer.team.whole_state(trainer.student)  # nothing is cast there
    stored = Checkpoint.open(student_dir)
    state = trainer.student.state_dict(keep_vars=True)
    frozen = {name for name, tensor in state.items() if not tensor.requires_grad and name in stored.tensors}
    return {name: stored.read(name) if name in frozen else tensor for name, tensor in state.items()}


def _tell(validation: list[dict[str, Any]]) -> None:
    """What training did to the perplexity of the validation text."""
    first, last = (validation[i]["validation_perplexity"] if validation else None for i in (0, -1))
    if first is None or last is None:
        return
    say(f"validation perplexity {first:.4g} -> {last:.4g}")
    if last > first:
        warn("the validation perplexity rose: lower train.learning_rate, or train for longer")
