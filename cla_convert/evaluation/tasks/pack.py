"""Where the shipped rows come from: one jsonl file a task, read without network and without a cache on disk.

The YAMLs name `pack.rows` as their `custom_dataset`, so `lm_eval --include_path` on this folder works as well. This
file imports nothing of the package, because lm-eval loads it by path.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


class Rows(list[dict[str, Any]]):
    """A list of rows with what lm-eval uses of a `datasets.Dataset`: column names and `map`.

    A Dataset takes a fingerprint of itself by pickling it, which fails where the package lies outside of
    `site-packages` (`pip install --target`): dill then pickles the module pyarrow by value. Rows need no cache.
    """

    @property
    def features(self) -> dict[str, None]:
        """The columns; lm-eval reads the keys only."""
        return dict.fromkeys(self[0])

    def map(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> "Rows":
        """Every row with the columns that `change` returns added or replaced, as `Dataset.map` does."""
        return Rows({**row, **change(row)} for row in self)


def names() -> list[str]:
    """Names of the shipped tasks, the same as those of the stock lm-eval tasks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> Rows:
    """Rows of one task, in the order in which `limit` takes them."""
    text = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")
    return Rows(json.loads(line) for line in text.split("\n") if line)


def rows(file: str, split: str, **_metadata: Any) -> dict[str, Rows]:
    """Return `{split: rows}` for lm-eval, which calls this with the task's `dataset_kwargs` and metadata."""
    return {split: read(file)}
