"""The end of uptraining: its result, and the model."""

from pathlib import Path
from typing import Any

from ..console import say, warn
from ..environment import peak_memory_bytes
from ..models.export import export_model
from ..results import TrainResult
from .state import Position, TrainingStates
from .trainer import Trainer


def publish(trainer: Trainer, student_dir: Path, out: Path, result: TrainResult, identity: dict[str, Any]) -> None:
    """Say what training did, and write the model: whole or not at all. All processes must ask; the first one writes."""
    _tell(result.validation)
    manifest = {"uptraining": result.to_json() | identity}
    state = trainer.student.state_dict(keep_vars=True)
    unchanged = {name for name, tensor in state.items() if not tensor.requires_grad}  # in memory it may be cast
    with trainer.team.whole_tensors(state) as tensors:
        if trainer.team.leads:
            say(f"writing the model to {out}")
            export_model(tensors, student_dir, out, unchanged=unchanged, manifest=manifest, overwrite=True)


def result_of(
    trainer: Trainer, position: Position, rows: list[dict[str, Any]], checkpoints: TrainingStates
) -> TrainResult:
    """What train.json says; `rows` are those of metrics.jsonl; `checkpoints` know what changed in mid-run."""
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
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "expected_memory_bytes": round(trainer.forecast.needs(trainer.micro_batch).peak),
        "device": trainer.device,
        "processes": trainer.team.size,
        "precision": trainer.precision.name,
        "data_digest": trainer.data.digest,
        "data": trainer.data.info,
        "changes": checkpoints.changes,
        "resumed": checkpoints.resumed,
    }
    return TrainResult.model_validate(found)


def _tell(validation: list[dict[str, Any]]) -> None:
    """What training did to the perplexity of the validation text."""
    first, last = (validation[i]["validation_perplexity"] if validation else None for i in (0, -1))
    if first is None or last is None:
        return
    say(f"validation perplexity {first:.4g} -> {last:.4g}")
    if last > first:
        warn("the validation perplexity rose: lower train.learning_rate, or train for longer")
