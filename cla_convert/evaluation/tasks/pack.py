"""Where the shipped rows come from: one jsonl file a task, read without network and without a cache on disk.

The YAMLs name `pack.rows` as their `custom_dataset`, so `lm_eval --include_path` on this folder works as well. This
file imports nothing of the package, because lm-eval loads it by path.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the shipped tasks, the same as those of the stock lm-eval tasks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> list[dict[str, Any]]:
    """Rows of one task, in the order in which `limit` takes them."""
    text = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def rows(file: str, split: str, **_metadata: Any) -> dict[str, Any]:
    """Return `{split: Dataset}` for lm-eval, which calls this with the task's `dataset_kwargs` and metadata."""
    from datasets import Dataset

    return {split: Dataset.from_list(read(file))}
