"""Evaluate a model folder with lm-eval under a frozen specification, one task at a time, losing nothing on a crash.

    out_dir/tasks/<task>.json    scores, stderr, n, versions and one entry per document, written as each task finishes
    out_dir/results.json         {tasks: {task: {metric: value}}, stderr, n, specification, specification_hash, ...}

The same recipe gives the same specification hash for the source, the converted and the uptrained model.
"""

import hashlib
import json
import random
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import console
from ..environment import pick_device
from ..files import read_json, write_json
from ..recipe import Evaluate
from .fingerprint import model_fingerprint
from .prepare import Prepared, prepare, reset
from .quiet import quiet
from .samples import compact, scores

Results = Iterator[tuple[str, dict[str, Any]]]

CHARACTERS_PER_TOKEN = 4
"""Only for the progress bar, which counts tokens before a tokenizer is loaded."""


def evaluate(
    model_dir: Path,
    spec: Evaluate,
    out_dir: Path,
    *,
    device: str,
    dtype: str = "auto",
    seed: int,
    cache_dir: Path | None = None,
    label: str = "",
) -> dict[str, Any]:
    """Score `model_dir` on every task of `spec`; finished tasks are skipped, cached ones are copied.

    Args:
        model_dir: plain transformers or CLA folder.
        out_dir: receives tasks/<task>.json and results.json.
        device, dtype: `auto` picks the device, and float32 on a CPU, bfloat16 on an accelerator.
        seed: few-shot examples and torch's generator.
        cache_dir: results by content of model and specification, shared between runs.
        label: what the progress bar calls this model.

    Returns:
        What results.json holds.

    Raises:
        UsageError, InputError: a task that does not exist or whose data cannot be had, before the model is loaded.
    """
    from .model import choose_dtype

    started = time.monotonic()
    device = pick_device(device)
    with quiet():
        prepared = prepare(spec, seed)
        common = _common(spec, choose_dtype(dtype, device), device, seed)
        model = model_fingerprint(model_dir)
        identity = {task.name: _hash([model, common, task.name, task.frozen]) for task in prepared}
        done = {task.name: _finished(task.name, identity[task.name], out_dir, cache_dir) for task in prepared}
        missing = [task for task in prepared if done[task.name] is None]
        for name, result in _run(missing, model_dir, common, seed, label):
            result["identity"] = identity[name]
            _store(name, result, out_dir, cache_dir)
            done[name] = result
    summary = _summary(prepared, done, common, model_dir, model, time.monotonic() - started)
    write_json(out_dir / "results.json", summary)
    return summary


def check_tasks(spec: Evaluate) -> None:
    """Resolve every task and its data, and nothing else: for a caller that wants to fail before hours of work.

    Raises:
        UsageError, InputError: as `evaluate`.
    """
    if unused := sorted(spec.limits.keys() - set(spec.tasks)):
        console.warn(f"eval.limits names tasks that are not evaluated: {', '.join(unused)}")
    with quiet():
        prepare(spec, seed=0)


def render(results: dict[str, Any]) -> str:
    """results.json as a table for a terminal."""
    lines = [f"{'task':<16} {'metric':<16} {'n':>6} {'value':>10} {'stderr':>8}"]
    for task, metrics in results["tasks"].items():
        for metric, value in metrics.items():
            error = results["stderr"].get(task, {}).get(metric)
            spread = "" if error is None else f"{error:.4f}"
            lines.append(f"{task:<16} {metric:<16} {results['n'][task]:>6} {value:>10.4f} {spread:>8}")
    return "\n".join([*lines, f"specification {results['specification_hash'][:16]}, {results['seconds']:.0f} s"])


def _common(spec: Evaluate, dtype: str, device: str, seed: int) -> dict[str, Any]:
    """What all tasks of a specification share. Versions belong to it: scores may move with them."""
    return {
        "batch_size": spec.batch_size,
        "rolling_batch_size": 1,
        "max_length": spec.max_length,
        "dtype": dtype,
        "device": device.partition(":")[0],
        "seed": seed,
        "versions": {name: version(name) for name in ("lm-eval", "torch", "transformers", "tokenizers")},
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _path(folder: Path, name: str) -> Path:
    return folder / "tasks" / f"{name.replace('/', '__')}.json"


def _finished(name: str, identity: str, out_dir: Path, cache_dir: Path | None) -> dict[str, Any] | None:
    """The result of this task for this model and specification, from the run folder or the cache."""
    result = read_json(_path(out_dir, name))
    if result is not None and result.get("identity") == identity:
        return result
    cached = read_json(cache_dir / f"{identity}.json") if cache_dir else None
    if cached is None or cached.get("identity") != identity:
        return None
    cached["cached"] = True
    write_json(_path(out_dir, name), cached, indent=None)
    return cached


def _store(name: str, result: dict[str, Any], out_dir: Path, cache_dir: Path | None) -> None:
    write_json(_path(out_dir, name), result, indent=None)
    if cache_dir is not None:
        write_json(cache_dir / f"{result['identity']}.json", result, indent=None)


def _run(tasks: list[Prepared], model_dir: Path, common: dict[str, Any], seed: int, label: str) -> Results:
    """Load the model once and yield (name, result) as each task finishes. Nothing to run: nothing is loaded."""
    from .model import load

    if not tasks:
        return

    settings = {key: common[key] for key in ("device", "dtype", "batch_size", "max_length")}
    lm = load(model_dir, **settings)
    total = sum(task.characters for task in tasks) // CHARACTERS_PER_TOKEN
    with closing(console.progress(total, f"eval {label}".strip(), unit="tok")) as bar:
        for task in tasks:
            bar.set_postfix_str(task.name)
            yield task.name, _run_task(task, lm, bar, seed)


def _run_task(task: Prepared, lm: Any, bar: Any, seed: int) -> dict[str, Any]:
    """Run one task (or group) and describe its result. The bar is advanced by exactly the task's share."""
    import lm_eval
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    reset(task, seed)
    share, start, lm.truncated = task.characters // CHARACTERS_PER_TOKEN, bar.n, 0
    lm.on_tokens = lambda tokens: bar.update(min(tokens, start + share - bar.n))
    began = time.monotonic()
    # lm_eval.evaluate, not simple_evaluate: the latter adds `git describe` and seconds of environment listing a task.
    output: Any = lm_eval.evaluate(lm, task.tasks, limit=task.frozen["limit"], bootstrap_iters=1000, log_samples=True)
    bar.update(start + share - bar.n)
    if lm.truncated:
        console.warn(f"{task.name}: {lm.truncated} requests exceed {lm.max_length} tokens and lost their start")
    values, stderr = scores(output["results"][task.name])
    return {
        "task": task.name, "scores": values, "stderr": stderr, "n": task.frozen["n"],
        "higher_is_better": output["higher_is_better"].get(task.name, {}), "specification": task.frozen,
        "truncated": lm.truncated, "max_length": lm.max_length, "seconds": round(time.monotonic() - began, 3),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "subtasks": {name: scores(output["results"][name])[0] for name in task.tasks["tasks"] if name != task.name},
        "samples": compact(output["samples"]),
    }  # fmt: skip


def _summary(
    tasks: list[Prepared], done: dict[str, Any], common: dict[str, Any], model_dir: Path, model: str, seconds: float
) -> dict[str, Any]:
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
        "specification": specification,
        "specification_hash": _hash(specification),
        "versions": common["versions"],
        "seconds": round(seconds, 3),
        "task_seconds": {name: result["seconds"] for name, result in results.items()},
        "from_cache": sorted(name for name, result in results.items() if result.get("cached")),
    }
