"""Evaluate a model folder with lm-eval under a frozen specification, one task at a time, losing nothing on a crash.

The same recipe gives the same specification hash for the source, the converted and the uptrained model. Files: see
results.py. Several processes (torchrun, accelerate launch) share the documents of every task, which is lm-eval's own
data parallelism; the first one writes.
"""

import random
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..console import progress, warn
from ..environment import choose_dtype
from ..files import write_json
from ..models.fingerprint import fingerprint
from ..recipe import Evaluate
from ..run_folder import PointFolder
from .backend import engine_settings, load_backend
from .batch import out_of_memory
from .context import CHARACTERS_PER_TOKEN, LOGITS, generation_of
from .prepare import Prepared, prepare, reset
from .quiet import quiet
from .results import digest, finished, store, summary
from .room import check_answers_fit
from .samples import compact, grid, scores

Results = Iterator[tuple[str, dict[str, Any]]]


def evaluate(
    model_dir: Path,
    spec: Evaluate,
    out_dir: Path,
    *,
    device: str,
    seed: int,
    cache_dir: Path | None = None,
    label: str = "",
    accelerator: Any = None,
) -> dict[str, Any]:
    """Score `model_dir` on every task of `spec`; finished tasks are skipped, cached ones are copied.

    Args:
        model_dir: plain transformers or CLA folder.
        spec: the recipe's `eval` section, with a batch size that is settled.
        out_dir: receives tasks/<task>.json and results.json.
        device: `cpu`, `cuda`, ...
        seed: few-shot examples, generated documents and torch's generator.
        cache_dir: results by content of model and specification, shared between runs.
        label: what the progress bar calls this model.
        accelerator: accelerate's Accelerator where several processes share the work.

    Returns:
        What results.json holds; in every process but the first, an empty dict.

    Raises:
        UsageError, InputError: a task that does not exist or whose data cannot be had, before the model is loaded.
        BatchTooLarge: out of memory; finished tasks are kept.
    """
    started = time.monotonic()
    first = accelerator is None or accelerator.is_main_process
    with quiet():
        prepared = prepare(spec, seed, model_dir)
        check_answers_fit(prepared, model_dir, spec.max_length)
        processes = accelerator.num_processes if accelerator else 1
        common = common_settings(spec, device, seed, processes)
        model = fingerprint(model_dir)
        identity = {task.name: digest([model, common, *identity_of(task, model_dir)]) for task in prepared}
        done = {task.name: finished(task.name, identity[task.name], out_dir, cache_dir) for task in prepared}
        if accelerator:
            accelerator.wait_for_everyone()  # nobody writes before all have looked at what is there
        missing = [task for task in prepared if done[task.name] is None]
        for name, result in _run(missing, model_dir, spec, common, device, label, accelerator):
            if first:
                done[name] = result = result | {"identity": identity[name]}
                store(name, result, out_dir, cache_dir)
    if not first:
        return {}
    result = summary(prepared, done, common, model_dir, model, time.monotonic() - started)
    write_json(PointFolder(out_dir).results.path, result)
    return result


def check_tasks(spec: Evaluate, model_dir: Path | None = None, seed: int = 0) -> None:
    """Resolve every task and its data, and nothing else: for a caller that wants to fail before hours of work.

    Raises:
        UsageError, InputError: as `evaluate`; what depends on the context and tokenizer of a model, with a `model_dir`.
    """
    with quiet():
        found = prepare(spec, seed, model_dir)
        if model_dir:
            check_answers_fit(found, model_dir, spec.max_length)
    if spec.include_path and not any("files" in task.frozen for task in found):
        warn(f"eval.tasks names none of the tasks in {spec.include_path} (eval.include_path)")
    unused = sorted(spec.limits.keys() - set(spec.tasks) - {task.name for task in found})
    if unused and spec.tasks:  # who wants texts alone need not clear a recipe's limits, too
        warn(f"eval.limits names tasks that are not evaluated by themselves: {', '.join(unused)}")


def identity_of(task: Prepared, model_dir: Path) -> list[Any]:
    """What a task's result depends on beside the model's weights and the settings of all tasks.

    Where text is generated, that is generation_config.json too, which no fingerprint has: a penalty for repetition
    stays whatever a task says.
    """
    generates = "generate_until" in task.frozen["output_type"]
    return [task.name, task.frozen, *([generation_of(model_dir)] if generates else [])]


def common_settings(spec: Evaluate, device: str, seed: int, processes: int = 1) -> dict[str, Any]:
    """What all tasks of a specification share. Versions belong to it: scores may move with them; which of several
    GPUs it was, and over how many a model lies, does not.
    """
    kind = device.partition(":")[0]
    # On a CPU a batch takes as long as its tokens do one after the other.
    together = {"rolling_batch_size": 1} if kind == "cpu" or spec.backend == "vllm" else {"logits_at_once": LOGITS}
    packages = ["lm-eval", "torch", "transformers", "tokenizers", *(["vllm"] if spec.backend == "vllm" else [])]
    return {
        "backend": {spec.backend: engine_settings(spec) if spec.backend == "vllm" else {}},
        "batch_size": spec.batch_size,
        **together,
        "max_length": spec.max_length,
        "dtype": choose_dtype(device),
        "device": kind,
        "processes": processes,
        "seed": seed,
        "versions": {name: version(name) for name in packages},
    }


def _run(
    tasks: list[Prepared],
    model_dir: Path,
    spec: Evaluate,
    common: dict[str, Any],
    device: str,
    label: str,
    accelerator: Any,
) -> Results:
    """Load the model once and yield (name, result) as each task finishes. Nothing to run: nothing is loaded."""
    if not tasks:
        return
    total = sum(task.characters for task in tasks) // CHARACTERS_PER_TOKEN
    hidden = accelerator is not None and not accelerator.is_main_process
    with (
        closing(load_backend(model_dir, spec, common, device, accelerator)) as lm,
        progress(total, f"eval {label}".strip(), unit="tok", hidden=hidden) as bar,
    ):
        for task in tasks:
            bar.note(task.name)
            with out_of_memory():
                result = _run_task(task, lm, bar, common["seed"])
            yield task.name, result


def _weighs_equally(task: Prepared, metric: str) -> bool:
    """Whether the score of a group is the mean over its tasks, however many documents each has."""
    group = task.tasks.get("groups", {}).get(task.name)
    rules = getattr(group, "aggregate_metric_list", None) or []
    return any(not rule.weight_by_size for rule in rules if rule.metric == metric.partition(",")[0])


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
    lm.in_turns = task.chat
    lm.on_tokens = lambda tokens: bar.move(min(bar.n + tokens, start + share))
    began = time.monotonic()
    # lm_eval.evaluate, not simple_evaluate: the latter adds `git describe` and seconds of environment listing a task.
    output: Any = lm_eval.evaluate(
        lm, task.tasks, limit=task.frozen["limit"], bootstrap_iters=1000, log_samples=True, **task.requesting
    )
    bar.move(start + share)
    truncated = lm.truncated_everywhere()
    if output is None:  # the results are with the first process
        return {}
    if truncated:
        warn(f"{task.name}: {truncated} requests exceed {lm.context} tokens with their answers and lost their start")
    values, stderr = scores(output["results"][task.name])
    return {
        "task": task.name, "scores": values, "stderr": stderr, "n": task.frozen["n"],
        "higher_is_better": output["higher_is_better"].get(task.name, {}), "specification": task.frozen,
        "truncated": truncated, "max_length": lm.context, "seconds": round(time.monotonic() - began, 3),
        "subtasks": {name: scores(output["results"][name])[0] for name in task.tasks["tasks"] if name != task.name},
        "equal_weights": [metric for metric in values if _weighs_equally(task, metric)],
        "samples": compact(output["samples"]), **grid(task.frozen["source"], output["samples"]),
    }  # fmt: skip
