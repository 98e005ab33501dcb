"""The result files of one model: tasks/<task>.json as each task finishes, results.json at the end.

tasks/<task>.json   task, scores, stderr, n, higher_is_better, specification, identity, truncated, max_length, seconds,
subtasks, equal_weights (metrics of a group that are means over its tasks), samples (one entry a document, see
samples.py); passkey and needle: grid
results.json        {tasks: {task: {metric: value}}, stderr, n, specification, specification_hash, ...}
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..console import say
from ..files import read_json, read_kept, write_json
from ..kept import note
from ..run_folder import PointFolder
from ..tables import table
from .prepare import Prepared

Json = dict[str, Any]


def digest(value: Any) -> str:
    """sha256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def finished(name: str, identity: str, out_dir: Path, cache_dir: Path | None) -> Json | None:
    """The result of this task for this model and specification, from the run folder or the cache."""
    result = read_json(PointFolder(out_dir).task(name))
    if result is not None and result.get("identity") == identity:
        return result
    if result is not None:
        say(f"{name}: measured before with another model or under other settings, and now anew")
    cached = read_kept(cache_dir / f"{identity}.json") if cache_dir else None
    if cached is None or cached.get("identity") != identity:
        return None
    cached["cached"] = True
    write_json(PointFolder(out_dir).task(name), cached, indent=None)
    return cached


def store(name: str, result: Json, out_dir: Path, cache_dir: Path | None) -> None:
    """Write a finished task to the run folder and the cache."""
    write_json(PointFolder(out_dir).task(name), result, indent=None)
    if cache_dir is not None:
        note(cache_dir / f"{result['identity']}.json", result)


def summary(tasks: list[Prepared], done: Json, common: Json, model_dir: Path, model: str, seconds: float) -> Json:
    """results.json: what a reader wants at a glance, and everything that fixes the measurement."""
    specification = {**common, "tasks": {task.name: task.frozen for task in tasks}}
    results = {task.name: done[task.name] for task in tasks}
    return {
        "model": str(model_dir),
        "model_fingerprint": model,
        "tasks": {name: result["scores"] for name, result in results.items()},
        "stderr": {name: result["stderr"] for name, result in results.items()},
        "n": {name: result["n"] for name, result in results.items()},
        "higher_is_better": {name: result["higher_is_better"] for name, result in results.items()},
        "truncated": {name: result["truncated"] for name, result in results.items() if result.get("truncated")},
        "specification": specification,
        "specification_hash": digest(specification),
        "versions": common["versions"],
        "seconds": round(seconds, 3),
        "from_cache": sorted(name for name, result in results.items() if result.get("cached")),
    }


def render(results: Json, width: int = 80) -> str:
    """results.json as a table for a screen of so many columns, and what was measured on plain text."""
    rows = []
    for task, metrics in results["tasks"].items():
        for metric, value in metrics.items():
            error = results["stderr"].get(task, {}).get(metric)
            spread = "" if error is None else f"{error:.4f}"
            rows.append([task, metric, str(results["n"][task]), f"{value:.4f}", spread])
    for text in results.get("texts", {}).values():
        for metric in ("perplexity", "bits_per_byte"):
            rows.append([text["name"], metric, str(text["tokens"]), f"{text[metric]:.4f}", ""])
    titles = ["task", "metric", "n", "value", "stderr"]
    measured = table(titles, rows, numbers=[False, False, True, True, True], width=width)
    in_turns = any("chat_template" in task for task in results["specification"]["tasks"].values())
    asked = "asked with the chat template\n" if in_turns else ""
    return f"{measured}\n{asked}specification {results['specification_hash'][:16]}, {results['seconds']:.0f} s"
