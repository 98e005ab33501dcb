"""What an evaluation that was interrupted has not measured: a point, or a part of it, that the others have."""

from ..run_folder import POINTS, TEXTS, PointFolder, RunFolder

_PARTS = {"results": "tasks", **TEXTS}


def missing(run: RunFolder) -> dict[str, list[str]]:
    """What each point of a run lacks of what was measured at another one: {point: parts in words}.

    Empty where all are complete, and where nothing was measured at all. A point that lacks everything lists everything.
    """
    found = {point: _measured(run.evaluation.point(point)) for point in _due(run)}
    parts = dict.fromkeys(part for measured in found.values() for part in measured)
    lacks = {
        point: [part for part in parts if part not in measured and not (point == "before" and _to_source(part))]
        for point, measured in found.items()
    }
    return {point: lacking for point, lacking in lacks.items() if lacking}


def told(lacks: dict[str, list[str]]) -> str:
    """`after: held-out text, law; control: tasks, held-out text, law`."""
    return "; ".join(f"{point}: {', '.join(parts)}" for point, parts in lacks.items())


def _due(run: RunFolder) -> list[str]:
    """The points of a run: an uptrained model is one of them as soon as it is finished."""
    trained = {"after": run.training.result.path.exists(), "control": run.control.result.path.exists()}
    return [point for point in POINTS if trained.get(point, True) or run.evaluation.point(point).results.path.exists()]


def _measured(point: PointFolder) -> list[str]:
    parts = [words for name, words in _PARTS.items() if point.measured(name).exists()]
    return [*parts, *point.text_files, *(f"{_PARTS['agreement']} on {name}" for name in point.compared_texts)]


def _to_source(part: str) -> bool:
    """Whether it is told of other models than the source only."""
    return part.startswith(_PARTS["agreement"])
