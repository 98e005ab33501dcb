"""What a run folder holds: a stage that did not run is None, never a guess; a file that is damaged is an error."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ClaError, InputError
from ..files import read_json, stays_in
from ..recipe_file import read_yaml

POINTS = ("before", "converted", "after", "control")
"""The points of measurement: source model, right after conversion, after uptraining; and the source model uptrained
on the same tokens, where a control was asked for."""

Json = dict[str, Any]

_SHOWN = ("*.json", "*.jsonl", "*.yaml", "control/*.json*", "eval/*.json", "eval/*/*.json", "eval/*/*/*.json")


@dataclass(frozen=True)
class RunFolder:
    """Files of one run. Attributes are empty dicts or lists where a file is missing."""

    path: Path
    recipe: Json
    convert: Json
    train: Json
    metrics: list[Json]
    environment: Json
    control_train: Json
    control_metrics: list[Json]
    results: dict[str, Json]
    """Point -> eval/<point>/results.json, for the points that were evaluated."""
    held_out: dict[str, Json]
    kv_cache: dict[str, Json]
    agreement: dict[str, Json]
    texts: dict[str, dict[str, Json]]
    """Point -> name of a text -> eval/<point>/perplexity/<name>.json."""
    domains: dict[str, Json]
    """Point -> eval/<point>/domains.json."""
    answers: dict[str, Json]
    """Point -> eval/<point>/answers.json."""
    touched: Json
    """eval/domains.json: which domains the run's text touched."""
    comparison: Json
    """eval/comparison.json: the statistics of before against the last point."""
    bench: Json

    def task_file(self, point: str, task: str) -> Json | None:
        """Per-document results of a task, or None."""
        return read_json(self.path / "eval" / point / "tasks" / f"{task.replace('/', '__')}.json")

    @property
    def last_point(self) -> str | None:
        """The point to compare with `before`: `after`, or `converted` when nothing was trained."""
        return next((point for point in ("after", "converted") if point in self.results), None)


def read_run_folder(path: Path) -> RunFolder:
    """Read a run folder. Raises InputError if it is none or a file in it is damaged, UsageError for its recipe."""
    if not path.is_dir() or not any(
        (path / name).exists() for name in ("recipe.yaml", "convert.json", "plan.json", "eval")
    ):
        raise InputError(
            f"{str(path)!r} is not a run folder",
            why="It has none of recipe.yaml, plan.json, convert.json and eval/.",
            fix="Give the folder that was passed as --out to `cla-convert run`.",
        )
    _refuse_links(path)
    return RunFolder(
        path=path,
        recipe=read_yaml(path / "recipe.yaml") if (path / "recipe.yaml").exists() else {},
        # Before the conversion has run, the plan already knows the map and the sizes.
        convert=(read_json(path / "plan.json") or {}) | (read_json(path / "convert.json") or {}),
        train=read_json(path / "train.json") or {},
        metrics=_read_lines(path / "metrics.jsonl"),
        control_train=read_json(path / "control" / "train.json") or {},
        control_metrics=_read_lines(path / "control" / "metrics.jsonl"),
        environment=read_json(path / "environment.json") or {},
        results=_by_point(path, "results.json"),
        held_out=_by_point(path, "held_out.json"),
        kv_cache=_by_point(path, "kv_cache.json"),
        agreement=_by_point(path, "agreement.json"),
        texts={point: _texts(path / "eval" / point / "perplexity") for point in POINTS},
        domains=_by_point(path, "domains.json"),
        answers=_by_point(path, "answers.json"),
        touched=(read_json(path / "eval" / "domains.json") or {}).get("domains", {}),
        comparison=read_json(path / "eval" / "comparison.json") or {},
        bench=read_json(path / "bench.json") or {},
    )


def _refuse_links(path: Path) -> None:
    """Raise InputError if a file that a report shows is a link to outside of the run folder."""
    files = [file for pattern in _SHOWN for file in path.glob(pattern)]
    if astray := [file for file in files if not stays_in(file, path)]:
        raise InputError(
            f"{min(astray)} is a link to outside of the run folder",
            why="A report must not show other files of this machine.",
            fix="Put the file itself there.",
        )


@contextmanager
def explained(run_dir: Path) -> Iterator[None]:
    """Turn what a run's files lead to, once they are read, into an InputError that names the folder.

    They have no schema of their own: what is missing or of another type is found where it is used.
    """
    try:
        yield
    except ClaError:
        raise
    except Exception as error:
        raise InputError(
            f"The results in {run_dir} cannot be read",
            why=f"A file does not hold what its stage leaves there: {type(error).__name__}: {error}"[:500],
            fix="Restore the file or run its stage again. CLA_DEBUG=1 shows where it was read.",
        ) from error


def _by_point(path: Path, name: str) -> dict[str, Json]:
    found = {point: read_json(path / "eval" / point / name) for point in POINTS}
    return {point: value for point, value in found.items() if value is not None}


def _texts(folder: Path) -> dict[str, Json]:
    found = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    return {name: value for name, value in found.items() if value is not None}


def _read_lines(path: Path) -> list[Json]:
    """Rows of a jsonl file. A last line cut off by a crash is left out. Raises InputError for any other damage."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                continue
            raise InputError(
                f"{path} is damaged", why=f"Line {number}: {error}.", fix="Restore or remove it."
            ) from error
        if isinstance(row, dict):
            rows.append(row)
    return rows
