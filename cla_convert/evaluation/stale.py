"""What is not of its run any more: another conversion, measurements of another model, another training's control."""

from typing import Any

from ..files import read_json
from ..models.fingerprint import fingerprint
from ..models.writer import read_manifest
from ..run_folder import RunFolder, TrainingFolder

_CONVERSION = ("sharing", "init", "kv_source_layers", "calibration")
_RATES = {"train.learning_rate", "train.learning_rates"}
_HOW = {"train.micro_batch_size", "train.compile", "train.precision", "train.activation_checkpointing"}
"""What changes the last bits only, and what `auto` makes of it depends on the machine."""


def stale_points(run: RunFolder) -> list[str]:
    """Points of a run whose model was made anew, or changed, since it was measured; one that is gone is none."""
    models = {"converted": run.converted, "after": run.training.model, "control": run.control.model}
    found = []
    for point, model in models.items():
        measured = (read_json(run.evaluation.point(point).results.path) or {}).get("model_fingerprint")
        if measured and model.is_dir() and fingerprint(model) != measured:
            found.append(point)
    return found


def unlike_record(run: RunFolder) -> list[str]:
    """In what the converted model was made otherwise than convert.json tells: `convert` may have replaced it.

    Empty where one of the two is missing.
    """
    told, made = read_json(run.convert.path), read_manifest(run.converted)
    if not (told and made):
        return []
    told, made = _conversion_of(told), _conversion_of(made)
    return [name for name in told if name in made and told[name] != made[name]]


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


def _conversion_of(record: dict[str, Any]) -> dict[str, Any]:
    """What tells one conversion of a source from another."""
    heads = record.get("kv_heads")
    if isinstance(heads, dict):  # of a manifest only where they are fewer, and with their groups
        heads = heads.get("after") if heads.get("after") != heads.get("before") else None
    return {name: record[name] for name in _CONVERSION if name in record} | {"kv_heads": heads}


def _training_of(folder: TrainingFolder) -> dict[str, Any]:
    """What of the manifest of a trained model its weights depend on."""
    made = read_manifest(folder.model).get("uptraining") or {}
    kept = {name: value for name, value in made.items() if name.startswith("train.") or name in ("data", "seed")}
    return kept | {"changes in mid-run": made.get("changes") or []} if kept else {}
