"""metrics.jsonl: one JSON object a row, appended as training goes.

After a resume the file is what an uninterrupted run would have written (times and memory apart): rows beyond the
checkpoint are dropped, and so is a last line that a kill cut short.
"""

import json
import os
from math import inf
from pathlib import Path
from typing import Any

from ..files import plain, read_rows, write_bytes


class Metrics:
    """Appends rows to a JSON lines file. Every row has a `step`."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Open the file; keep the rows up to `resume_step` (None: start an empty one).

        Raises InputError if it is damaged otherwise than by a kill.
        """
        rows = [] if resume_step is None else [row for row in read_rows(path) if row.get("step", inf) <= resume_step]
        write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file = path.open("a", encoding="utf-8")
        self._validated = {row["step"] for row in rows if "validation_perplexity" in row}
        self.losses: list[float] = [row["loss"] for row in rows if "loss" in row]
        """Of every step so far."""

    def has_validation(self, step: int) -> bool:
        """Whether the validation of this step is on file."""
        return step in self._validated

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, visible to readers at once."""
        if "validation_perplexity" in row:
            self._validated.add(row["step"])
        if "loss" in row:
            self.losses.append(row["loss"])
        self._file.write(json.dumps(plain(row), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Force the rows to the disk: a checkpoint must not outlive the rows before it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NoMetrics(Metrics):
    """For all processes of a run but the first, which writes for them."""

    def __init__(self) -> None:
        """Open nothing."""
        self.losses = []

    def has_validation(self, step: int) -> bool:
        """Never asked: the first process decides."""
        return False

    def write(self, row: dict[str, Any]) -> None:
        """Drop the row."""

    def sync(self) -> None:
        """Nothing to force."""

    def close(self) -> None:
        """Nothing to close."""
