"""Resolve task names into tasks whose data is in hand, before any model is loaded."""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from ..errors import ClaError, InputError, UsageError, did_you_mean
from ..recipe import Evaluate
from .tasks import pack


@dataclass(frozen=True)
class Prepared:
    """One requested task (or group of tasks) with its data, and what identifies the measurement."""

    name: str
    tasks: Any
    """lm-eval's TaskDict: {"tasks": {name: Task}, "groups": ..., "group_map": ...}."""
    frozen: dict[str, Any]
    """source, version, num_fewshot, limit, n, requests, prompts (sha256 over every context and continuation)."""
    characters: int
    """Characters that the model will read, for the progress bar."""


def prepare(spec: Evaluate, seed: int) -> list[Prepared]:
    """Build every task of the specification with its requests.

    Raises:
        UsageError: no task, or a task that does not exist.
        InputError: the data of a stock task cannot be had (no network, gated, dependency missing).
    """
    names = list(dict.fromkeys(spec.tasks))
    if not names:
        raise UsageError("No tasks to evaluate", fix=f"The offline pack has {', '.join(pack.names())}")
    shipped = set(pack.names()) if spec.offline_pack else set()
    manager = _manager(pack_only=set(names) <= shipped, with_pack=spec.offline_pack)
    names = [name for requested in names for name in _expand(manager, requested, spec)]
    return [_prepare(manager, name, spec, seed, name in shipped) for name in dict.fromkeys(names)]


def _manager(*, pack_only: bool, with_pack: bool) -> Any:
    from lm_eval.tasks import TaskManager

    from ..console import say

    if not pack_only:  # about 14 000 YAML files to parse
        say("Reading the list of stock lm-eval tasks ...")
    # Only the documented arguments; later paths win, so the pack replaces the stock tasks of the same name.
    return TaskManager(include_path=str(pack.FOLDER) if with_pack else None, include_defaults=not pack_only)


def _expand(manager: Any, name: str, spec: Evaluate) -> list[str]:
    """A tag becomes its tasks; a task or group stays. Raises UsageError for a name nobody knows."""
    if name in manager.all_tags:
        return sorted(manager.task_index[name].tags)
    if name in manager.all_subtasks or name in manager.all_groups:
        return [name]
    where = "in lm-eval or in the offline pack" if spec.offline_pack else "in lm-eval"
    raise UsageError(
        f"There is no evaluation task named {name!r}.{did_you_mean(name, pack.names() + manager.all_tasks)}",
        why=f"No task, group or tag of that name exists {where}.",
        fix=f"Offline: {', '.join(pack.names())}. With a network: any task that `lm_eval ls tasks` lists.",
    )


def _prepare(manager: Any, name: str, spec: Evaluate, seed: int, shipped: bool) -> Prepared:
    limit = spec.limits.get(name, spec.limit)
    try:
        tasks = manager.load([name])
        for task in tasks["tasks"].values():
            _configure(task, spec, seed)
            task.build_all_requests(limit=limit, rank=0, world_size=1)
    except ClaError:
        raise
    except Exception as error:
        # Whatever a third party's loader raises here, no work has begun: say it as a refusal (CLA_DEBUG shows all).
        raise _no_data(name, error, shipped) from error
    return _describe(name, tasks, "offline pack" if shipped else "lm-eval", limit)


def _configure(task: Any, spec: Evaluate, seed: int) -> None:
    """Few-shot count and seed, by the rules of lm-eval's simple_evaluate: a task that fixes 0 keeps it."""
    default = task.get_config("num_fewshot")
    if default is None or (spec.num_fewshot is not None and default != 0):
        task.set_config(key="num_fewshot", value=spec.num_fewshot or 0)
    task.set_fewshot_seed(seed=seed)


def reset(prepared: Prepared, seed: int) -> None:
    """Restart the few-shot sampling, so that building the requests again gives the same prompts."""
    for task in prepared.tasks["tasks"].values():
        task.set_fewshot_seed(seed=seed)


def _describe(name: str, tasks: Any, source: str, limit: int | None) -> Prepared:
    digest, characters, requests, documents = hashlib.sha256(), 0, 0, 0
    for task_name, task in tasks["tasks"].items():
        documents += len({instance.doc_id for instance in task.instances})
        for instance in task.instances:
            arguments = [argument if isinstance(argument, str) else repr(argument) for argument in instance.args]
            digest.update(json.dumps([task_name, instance.doc_id, arguments]).encode())
            characters += sum(map(len, arguments))
            requests += 1
    leaves = tasks["tasks"].values()
    frozen = {
        "source": source,
        "version": {task_name: task.VERSION for task_name, task in tasks["tasks"].items()},
        "num_fewshot": sorted({task.get_config("num_fewshot") or 0 for task in leaves}),
        "output_type": sorted({str(task.OUTPUT_TYPE) for task in leaves}),
        "limit": limit,
        "n": documents,
        "requests": requests,
        "prompts": digest.hexdigest(),
    }
    return Prepared(name, tasks, frozen, characters)


def _no_data(name: str, error: Exception, shipped: bool) -> InputError:
    reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:300]}"
    if shipped:
        return InputError(f"The shipped task {name!r} cannot be read", reason, "Reinstall cla-convert.")
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
    return InputError(
        f"The data of the task {name!r} cannot be loaded" + (" while offline" if offline else ""),
        why=("HF_HUB_OFFLINE is set, and the rows are not in the local cache. " if offline else "") + reason,
        fix=f"Use the offline pack ({', '.join(pack.names())}; eval.offline_pack: true)"
        + (", or unset HF_HUB_OFFLINE where there is a network." if offline else ", or check the network and access."),
    )
