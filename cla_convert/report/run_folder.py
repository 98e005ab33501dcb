"""What a run folder holds: a stage that did not run is None, never a guess; a file that is damaged is an error."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..console import command
from ..errors import ClaError, InputError
from ..evaluation.missing import missing
from ..evaluation.stale import stale_points
from ..files import read_json, read_rows, stays_in
from ..recipe_file import read_yaml
from ..run_folder import POINTS, TEXTS, RunFolder

Json = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
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
    text_agreement: dict[str, dict[str, Json]]
    """Point -> name of a text -> eval/<point>/agreement/<name>.json."""
    domains: dict[str, Json]
    """Point -> eval/<point>/domains.json."""
    answers: dict[str, Json]
    """Point -> eval/<point>/answers.json."""
    touched: Json
    """eval/domains.json: which domains the run's text touched."""
    touched_texts: Json
    """The same of text files."""
    comparison: Json
    """eval/comparison.json: the statistics of before against the last point."""
    bench: Json

    @property
    def files(self) -> RunFolder:
        """Where they lie."""
        return RunFolder(self.path)

    @cached_property
    def stale(self) -> list[str]:
        """Points whose model is another one now than was measured."""
        return stale_points(self.files)

    def task_file(self, point: str, task: str) -> Json | None:
        """Per-document results of a task, or None."""
        return read_json(self.files.evaluation.point(point).task(task))

    @cached_property
    def incomplete(self) -> dict[str, list[str]]:
        """What an interrupted evaluation left out, by point."""
        return missing(self.files)

    @property
    def last_point(self) -> str:
        """The point to compare with `before`, measured or not: never another one in its place."""
        return self.files.last_point


def read_run_folder(path: Path) -> RunFiles:
    """Read a run folder. Raises InputError if it is none or a file in it is damaged, UsageError for its recipe."""
    run = RunFolder(path)
    results = (run.plan.path, run.convert.path, run.training.result.path, run.training.metrics, run.bench)
    if not any(file.exists() for file in (*results, run.evaluation.path)):
        begun = run.recipe.exists()
        if (whole := RunFolder.around(path)) and whole.path != path:
            raise InputError(
                f"{path} is a part of a run, not a run folder",
                why=f"The report is of the whole run, {whole.path}.",
                fix=f"`{command('report', whole.path)}` writes it.",
            )
        raise InputError(
            f"{path} holds nothing to report yet" if begun else f"{path} is not a run folder",
            why=f"It has {'recipe.yaml, but ' if begun else ''}none of plan.json, convert.json, train.json and eval/.",
            fix=f"`{command('run', run.recipe, '--out', path)}` makes them."
            if begun
            else "Give the folder that was passed as --out to `cla-convert run`.",
        )
    _refuse_links(run)
    touched = read_json(run.evaluation.domains.path) or {}
    return RunFiles(
        path=path,
        recipe=read_yaml(run.recipe) if run.recipe.exists() else {},
        # Before the conversion has run, the plan already knows the map and the sizes.
        convert=(read_json(run.plan.path) or {}) | (read_json(run.convert.path) or {}),
        train=read_json(run.training.result.path) or {},
        metrics=read_rows(run.training.metrics),
        control_train=read_json(run.control.result.path) or {},
        control_metrics=read_rows(run.control.metrics),
        environment=read_json(run.environment.path) or {},
        **{name: _by_point(run, name) for name in ("results", "kv_cache", *TEXTS)},  # a field each
        texts={point: _texts(run.evaluation.point(point).text_files) for point in POINTS},
        text_agreement={point: _texts(run.evaluation.point(point).compared_texts) for point in POINTS},
        touched=touched.get("domains", {}),
        touched_texts=touched.get("texts", {}),
        comparison=read_json(run.evaluation.comparison) or {},
        bench=read_json(run.bench) or {},
    )


def _refuse_links(run: RunFolder) -> None:
    """Raise InputError if a file that a report shows is a link to outside of the run folder."""
    if astray := [file for file in run.shown if not stays_in(file, run.path)]:
        raise InputError(
            f"{min(astray)} is a link to outside of the run folder",
            why="A report must not show other files of this machine.",
            fix="Put the file itself there.",
        )


@contextmanager
def explained(run_dir: Path) -> Iterator[None]:
    """Turn what a run's files lead to, once they are read, into an InputError that names the folder.

    They have no schema of their own: what is missing or of another type is found where it is used. A package that is
    missing, or what the system refuses, says nothing of them.
    """
    try:
        yield
    except (ClaError, ImportError, OSError):
        raise
    except Exception as error:
        raise InputError(
            f"The results in {run_dir} cannot be read",
            why=f"A file does not hold what its stage leaves there: {type(error).__name__}: {error}"[:500],
            fix="Restore the file or run its stage again. CLA_DEBUG=1 shows where it was read.",
        ) from error


def _by_point(run: RunFolder, name: str) -> dict[str, Json]:
    found = {point: read_json(run.evaluation.point(point).measured(name)) for point in POINTS}
    return {point: value for point, value in found.items() if value is not None}


def _texts(files: dict[str, Path]) -> dict[str, Json]:
    found = {name: read_json(path) for name, path in files.items()}
    return {name: value for name, value in found.items() if value is not None}
