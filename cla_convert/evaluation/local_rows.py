"""Full evaluation sets from local files (`eval.task_data`): rows for a stock task, without a network.

    DIR/<task>/<split>.jsonl                     one JSON object a line
    DIR/<task>/<split>_anything.jsonl            (or -anything, .anything)
    DIR/<task>/<split>-00000-of-00001.parquet    as the hub stores it; several files of a split are one after another

<task> is lm-eval's name, <split> is train, validation, test or dev, columns are those of the data set that the stock
task reads from the hub. Only rows come from here: prompts, targets, metrics are the task's own.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

from ..errors import InputError, first_line
from ..refusals import unread
from ..surrogates import replaced
from .tasks.pack import Rows

SPLITS = ("train", "validation", "test", "dev")


def local_splits(folder: Path) -> dict[str, Rows]:
    """Rows of every split in the folder of a task, in a fixed random order, so that the first n are a random sample.

    Raises:
        InputError: no file of a known split, or one that cannot be read.
    """
    found = {split: Rows(row for file in _files(folder, split) for row in _read(file)) for split in SPLITS}
    found = {split: rows for split, rows in found.items() if rows}
    if not found:
        raise InputError(
            f"{folder} holds no rows of the task {folder.name!r}",
            why=f"Expected a file such as {folder / 'test.jsonl'} or {folder / 'validation-00000-of-00001.parquet'}.",
            fix="See docs/evaluation.md for the layout.",
        )
    for split, rows in found.items():
        if folder.name == "boolq":
            rows[:] = map(_with_label, rows)
        random.Random(f"{folder.name}-{split}").shuffle(rows)
    return found


def missing_columns(task: Any) -> list[str]:
    """Columns that a task names plainly and its rows lack: lm-eval would take the name itself for the value.

    A template that names an absent column fails by itself.
    """
    plain = [task.get_config(key) for key in ("doc_to_text", "doc_to_target", "doc_to_choice")]
    return [name for name in plain if isinstance(name, str) and name.isidentifier() and name not in task.features]


def _files(folder: Path, split: str) -> list[Path]:
    """`validation.jsonl` and `validation-00000-of-00001.parquet`, but not `validation_notes.txt`."""
    pattern = re.compile(rf"{split}([-_.].*)?\.(jsonl|parquet)")
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            return parquet.read_table(path).to_pylist()
        # Not splitlines(): it also breaks at U+2028 and friends, which JSON strings may hold.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        rows = replaced([_parsed(line, number) for number, line in enumerate(lines, 1) if line.strip()], str(path))
    except (OSError, ValueError) as error:
        raise unread(error, InputError(f"{path} cannot be read", first_line(error))) from error
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} cannot be read", why="Every line must be a JSON object.")
    return rows


def _parsed(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:  # which counts lines within this one
        raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error


def _with_label(row: dict[str, Any]) -> dict[str, Any]:
    """google/boolq says `answer`; lm-eval's task reads super_glue's `label`, 1 for yes."""
    return row if "label" in row else {**row, "label": int(row["answer"])}
