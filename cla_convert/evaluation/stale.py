"""What is not of its run any more: another conversion, measurements of another model, another training's control."""

from pathlib import Path
from typing import Any

from ..files import read_json
from ..models.fingerprint import fingerprint
from ..models.writer import read_manifest
from ..run_folder import RunFolder, TrainingFolder

_RATES = {"train.learning_rate", "train.learning_rates"}
_HOW = {"train.micro_batch_size", "train.compile", "train.precision", "train.activation_checkpointing"}
"""What changes the last bits only, and what `auto` makes of it depends on the machine."""


def stale_points(run: RunFolder) -> list[str]:
    """Points of a run whose model was made anew, or changed, since it was measured; one that is gone is none."""
    models = {"converted": run.converted, "after": run.training.model, "control": run.control.model}
    measured = {point: read_json(run.evaluation.point(point).results.path) or {} for point in models}
    return [point for point, model in models.items() if _is_other(model, measured[point].get("model_fingerprint"))]


def is_replaced(run: RunFolder) -> bool:
    """Whether the converted model is another than convert.json tells of: `convert` may have put it there."""
    return _is_other(run.converted, (read_json(run.convert.path) or {}).get("model_fingerprint"))


def trained_from_another(training: TrainingFolder, student: Path) -> bool:
    """Whether a trained model began as another one than `student` is now."""
    return _is_other(student, (read_manifest(training.model).get("uptraining") or {}).get("model"))


def unlike_control(run: RunFolder, *, auto_rates: bool) -> list[str]:
    """In what the control of a run was not trained as the uptrained model; empty where one of the two is missing.

    Args:
        run: its folder.
        auto_rates: whether the recipe leaves learning rates to the weights, which the two models differ in.
    """
    trained, control = _training_of(run.training), _training_of(run.control)
    if not (trained and control):
        return []
    names = sorted((trained.keys() & control.keys()) - _HOW - (_RATES if auto_rates else set()))
    told = [name for name in names if trained[name] != control[name]]
    return ["the text" if name == "data" else name for name in told]


def _is_other(model: Path, known: str | None) -> bool:
    """Whether a model is not the one of this fingerprint; False where it is gone, or nothing was recorded."""
    return bool(known) and model.is_dir() and fingerprint(model) != known


def _training_of(folder: TrainingFolder) -> dict[str, Any]:
    """What of the manifest of a trained model its weights depend on."""
    made = read_manifest(folder.model).get("uptraining") or {}
    kept = {name: value for name, value in made.items() if name.startswith("train.") or name in ("data", "seed")}
    return kept | {"changes in mid-run": made.get("changes") or []} if kept else {}
