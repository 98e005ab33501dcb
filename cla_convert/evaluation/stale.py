"""Measurements that are of another model than the one that lies there now."""

from ..files import read_json
from ..models.fingerprint import fingerprint
from ..run_folder import RunFolder


def stale_points(run: RunFolder) -> list[str]:
    """Points of a run whose model was made anew, or changed, since it was measured; one that is gone is none."""
    models = {"converted": run.converted, "after": run.training.model, "control": run.control.model}
    found = []
    for point, model in models.items():
        measured = (read_json(run.evaluation.point(point).results.path) or {}).get("model_fingerprint")
        if measured and model.is_dir() and fingerprint(model) != measured:
            found.append(point)
    return found


def told(point: str) -> str:
    """In words, for what could not be compared."""
    return f"{point}: the model is not the one that was measured; it was made anew or changed since."
