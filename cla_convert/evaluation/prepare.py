"""Resolve task names into tasks whose data is in hand, before any model is loaded."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..console import progress
from ..errors import ClaError, InputError, UsageError, did_you_mean
from ..files import looked_in, path_of
from ..recipe import Evaluate
from . import retrieval
from .asked import check_asked
from .chat_template import ChatTemplate
from .local_rows import local_splits, missing_columns
from .own_tasks import OwnTasks, rehearse, rows_digest
from .retrieval.documents import retrieval_rows
from .stock_tasks import declared, is_stock, manager_for, parts_of, unscored_parts
from .tasks import pack

_LAYOUT = "Columns are those of the data set that the stock task reads from the hub (docs/evaluation.md)."


@dataclass(frozen=True)
class Prepared:
    """One requested task (or group of tasks) with its data, and what identifies the measurement."""

    name: str
    tasks: Any
    """lm-eval's TaskDict: {"tasks": {name: Task}, "groups": ..., "group_map": ...}."""
    frozen: dict[str, Any]
    """source (offline pack, local files, generated, own task or lm-eval), version, split, num_fewshot, limit, n,
    requests, prompts (sha256 over every context and continuation); chat_template (its hash), where it is asked with
    one; files and rows (hashes) of a task of the user's own."""
    characters: int
    """Characters that the model will read, for the progress bar."""
    chat: ChatTemplate | None = None
    """What puts its questions into turns."""

    @property
    def requesting(self) -> dict[str, Any]:
        """How its requests are formed, for lm-eval, whose command line does the same with --apply_chat_template."""
        return {"apply_chat_template": True, "fewshot_as_multiturn": True} if self.chat else {}


def prepare(spec: Evaluate, seed: int, model_dir: Path | None = None) -> list[Prepared]:
    """Build every task of the specification with its requests.

    Args:
        spec: the recipe's `eval` section.
        seed: of few-shot examples and generated documents.
        model_dir: its tokenizer and context decide the documents of passkey and needle, and its chat template the
            prompts where that is asked for; None leaves those tasks out, and asks plainly.

    Raises:
        UsageError: neither task nor text, or a task that does not exist, or a length that the model is not fed.
        InputError: the data of a stock task cannot be had (no network, gated, dependency missing); the tokenizer has
            no chat template, or one that cannot be used.
    """
    check_asked(spec)
    names = list(dict.fromkeys(spec.tasks))
    sources = Sources.of(spec)
    chat = ChatTemplate.of(model_dir, spec.chat_template_args) if spec.chat_template and model_dir else None
    manager = _manager(sources, names)
    asked = [(name, requested) for requested in names for name in _expand(manager, requested, spec)]
    _refuse_unread(manager, [name for name, _ in asked], sources)
    limits = {name: _limit(name, requested, spec) for name, requested in reversed(asked)}
    names = [name for name in dict.fromkeys(name for name, _ in asked) if model_dir or name not in retrieval.names()]
    with progress(len(names), "preparing tasks", unit="task", leave=False) as bar:
        prepared: list[Prepared] = []
        for name in names:
            bar.note(name)
            build = partial(_prepare, manager, name, limits[name], spec, seed, sources, model_dir, chat)
            anew = name in retrieval.names() or bool(({name} | parts_of(manager, name)) & sources.own.names)
            origin = None if anew else _origin(name, limits[name], spec, seed, sources, chat)
            prepared.append(_once(origin, build) if origin else build())
            bar.update()
        return prepared


@dataclass(frozen=True)
class Sources:
    """Where the rows of a task come from, by its name."""

    local: dict[str, Path]
    """Tasks that have a folder in `eval.task_data`."""
    own: OwnTasks
    """Tasks of `eval.include_path`, which replace others of their name, as in lm-eval."""
    shipped: frozenset[str]

    @classmethod
    def of(cls, spec: Evaluate) -> "Sources":
        """Raises InputError if `eval.task_data` is no folder, and what `OwnTasks.of` raises."""
        folder = path_of(spec.task_data) if spec.task_data else None
        if folder is not None and not folder.is_dir():
            raise InputError(f"There is no folder {folder}", looked_in(folder), "Check eval.task_data (--task-data).")
        local = {path.name: path for path in folder.iterdir() if path.is_dir()} if folder else {}
        own = OwnTasks.of(spec.include_path)
        return cls(local, own, frozenset(pack.names() if spec.offline_pack else []) - own.names)

    def name(self, task: str) -> str:
        """In words, for the specification and the report."""
        if task in retrieval.names():
            return "generated"
        if task in self.local:
            return "local files"
        if task in self.own.names:
            return "own task"
        return "offline pack" if task in self.shipped else "lm-eval"


def _manager(sources: Sources, names: list[str]) -> Any:
    folders = [*([pack.FOLDER] if sources.shipped else []), retrieval.FOLDER, sources.own.folder]  # later ones win
    here = sources.shipped | set(retrieval.names()) | sources.own.names
    inner = {part for name in names for part in sources.own.parts(name) - here if is_stock(part)}
    return manager_for((set(names) | inner) - here, [str(folder) for folder in folders if folder])


def _refuse_unread(manager: Any, names: list[str], sources: Sources) -> None:
    """Raise UsageError for local rows of a group or of its parts: lm-eval reads all of it from the hub."""
    for name in names:
        if name in manager.all_groups and (unread := ({name} | parts_of(manager, name)) & sources.local.keys()):
            raise UsageError(
                f"The local rows of {', '.join(sorted(unread))} are not read for the group {name!r}",
                why="eval.task_data is for tasks that are evaluated by themselves.",
                fix="Name the tasks instead of the group, or take their folders out of eval.task_data.",
            )


def _expand(manager: Any, name: str, spec: Evaluate) -> list[str]:
    """A tag, or a group that has no score of its own, becomes its tasks; a task or any other group stays.

    Raises UsageError for a name nobody knows.
    """
    if name in manager.all_tags:
        return sorted(manager.task_index[name].tags)
    if name in manager.all_groups and (parts := unscored_parts(manager, name)):
        return [one for part in parts for one in _expand(manager, part, spec)]
    if name in manager.all_subtasks or name in manager.all_groups:
        return [name]
    own = Sources.of(spec).own.names
    known = [*sorted(own), *pack.names(), *retrieval.names()]
    hint = did_you_mean(name, known) or did_you_mean(name, declared())  # the pack first: it needs no network
    where = "in lm-eval or in the offline pack" if spec.offline_pack else "in lm-eval"
    where = f"in {spec.include_path}, {where}" if own else where
    raise UsageError(
        f"There is no evaluation task named {name!r}.{hint}",
        why=f"No task, group or tag of that name exists {where}.",
        fix=f"Offline: {', '.join(known)}. With a network: any task that `lm_eval ls tasks` lists.",
    )


def _limit(name: str, requested: str, spec: Evaluate) -> int | None:
    """Documents of a task: its own limit, that of the tag or group that it was asked for with, or the one for all."""
    # The grid of a generated task is its own limit: half a heat map helps nobody.
    default = None if name in retrieval.names() else spec.limit
    return spec.limits.get(name, spec.limits.get(requested, default))


_built: dict[str, Prepared] = {}
"""Tasks of this process by what they were built from: for thousands of rows that takes half a minute, and a run asks
three models the same."""


def _once(built_from: str, build: Callable[[], Prepared]) -> Prepared:
    if built_from not in _built:
        _built[built_from] = build()
    return _built[built_from]


def _origin(
    name: str, limit: int | None, spec: Evaluate, seed: int, sources: Sources, chat: ChatTemplate | None
) -> str:
    """All that a task is built from, where no model's context and tokenizer decide its documents."""
    folder = sources.local.get(name)
    states = [(file.name, file.stat()) for file in sorted(folder.iterdir())] if folder else []
    files = [(file, state.st_mtime_ns, state.st_size) for file, state in states]
    return json.dumps([name, limit, seed, spec.model_dump(mode="json"), str(folder), files, chat and chat.identity])


def _prepare(
    manager: Any,
    name: str,
    limit: int | None,
    spec: Evaluate,
    seed: int,
    sources: Sources,
    model_dir: Path | None,
    chat: ChatTemplate | None,
) -> Prepared:
    try:
        tasks = _load(manager, name, _rows(name, spec, seed, sources, model_dir))
        _refuse_unfit(name, tasks["tasks"].values())
        prepared = Prepared(name, tasks, {}, 0, chat if _has_turns(name, tasks) else None)
        for task in tasks["tasks"].values():
            _configure(task, spec, seed)
            task.build_all_requests(
                limit=limit, rank=0, world_size=1, chat_template=prepared.chat, **prepared.requesting
            )
            if _made_of(name, tasks) & sources.own.names:
                rehearse(task)
        return _describe(prepared, sources, limit)
    except ClaError:
        raise
    except Exception as error:
        # Whatever a third party's loader raises here, no work has begun: say it as a refusal (CLA_DEBUG shows all).
        raise _no_data(name, error, sources) from error


def _refuse_unfit(name: str, tasks: Iterable[Any]) -> None:
    """Raise UsageError for what lm-eval refuses as well, but after the model is loaded."""
    for task in tasks:
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(
                f"The task {name!r} runs code that the model writes",
                why="Nothing would keep that code from doing harm here.",
                fix="Leave it out; lm_eval runs it on one's own responsibility (--confirm_run_unsafe_code).",
            )
        if getattr(task, "MULTIMODAL", False):
            raise UsageError(f"The task {name!r} asks about images or sound", fix="Leave it out: models get text here.")


def _has_turns(name: str, tasks: Any) -> bool:
    """Whether a task asks something that could stand in a conversation: a text to be read through is none.

    Nor are passkey and needle: their prompts end in the middle of a sentence, and their lengths are counted.
    """
    rolling = all(task.OUTPUT_TYPE == "loglikelihood_rolling" for task in tasks["tasks"].values())
    return name not in retrieval.names() and not rolling


def _rows(
    name: str, spec: Evaluate, seed: int, sources: Sources, model_dir: Path | None
) -> dict[str, pack.Rows] | None:
    """Rows by split for a task that does not bring its own."""
    if name in retrieval.names() and model_dir is not None:
        return {"test": retrieval_rows(name, spec, seed, model_dir)}
    return local_splits(sources.local[name]) if name in sources.local else None


def _load(manager: Any, name: str, rows: dict[str, pack.Rows] | None) -> Any:
    """Load a task or group, with its own rows or with these."""
    if rows is None:
        return manager.load([name])
    config = manager.task_index[name].cfg
    splits = [key for key in ("training_split", "validation_split", "test_split", "fewshot_split") if config.get(key)]
    changes = {key: None for key in splits if config[key] not in rows}
    if config.get("test_split") not in rows and config.get("validation_split") not in rows:
        wanted = " or ".join(config[key] for key in ("test_split", "validation_split") if config.get(key))
        raise InputError(f"The files of the task {name!r} hold {', '.join(rows)}, not {wanted}")
    # A group of one is lm-eval's documented way to override settings of a registered task.
    changes |= {"task": name, "custom_dataset": lambda **_: rows, "dataset_kwargs": {}}
    task = manager.load([{"group": f"{name}-rows", "task": [changes]}])["tasks"][name]
    if missing := missing_columns(task):
        raise InputError(f"The rows of the task {name!r} have no column {', '.join(missing)}", fix=_LAYOUT)
    return {"tasks": {name: task}, "groups": {}, "group_map": {}}


def _configure(task: Any, spec: Evaluate, seed: int) -> None:
    """Few-shot count and seed, by the rules of lm-eval's simple_evaluate: a task that fixes 0 keeps it."""
    default = task.get_config("num_fewshot")
    if default is None or (spec.num_fewshot is not None and default != 0):
        task.set_config(key="num_fewshot", value=spec.num_fewshot or 0)
    task.set_fewshot_seed(seed=seed)
    _leave_itself_out(task)


def _leave_itself_out(task: Any) -> None:
    """See to it that no document is among its own few-shot examples, answer and all.

    lm-eval leaves it out only where the names of both splits are equal, and examples may come from the rows that are
    evaluated without being named: where a task has, or was given, no others.
    """
    examples, config = getattr(task, "fewshot_cfg", None), task.config
    if examples is None or (examples.split is None and examples.samples is not None):  # not from a split
        return
    drawn = examples.split or config.training_split or config.validation_split or config.test_split
    if drawn == (config.test_split or config.validation_split):
        examples.split = config.test_split  # the examples themselves are read already


def _made_of(name: str, tasks: Any) -> set[str]:
    """Names of a task or group and of all that it was built of: what is written out in a group has that in front."""
    return {part.rpartition("::")[2] for part in (name, *tasks["tasks"], *tasks["groups"])}


def reset(prepared: Prepared, seed: int) -> None:
    """Restart the few-shot sampling, so that building the requests again gives the same prompts."""
    for task in prepared.tasks["tasks"].values():
        task.set_fewshot_seed(seed=seed)


def _describe(prepared: Prepared, sources: Sources, limit: int | None) -> Prepared:
    """The same, described: its requests are built."""
    name, tasks = prepared.name, prepared.tasks
    digest, characters, requests, documents = hashlib.sha256(), 0, 0, 0
    for task_name, task in tasks["tasks"].items():
        documents += len({instance.doc_id for instance in task.instances})
        for instance in task.instances:
            arguments = [argument if isinstance(argument, str) else repr(argument) for argument in instance.args]
            digest.update(json.dumps([task_name, instance.doc_id, arguments]).encode())
            characters += sum(map(len, arguments))
            requests += 1
    leaves = tasks["tasks"].values()
    splits = {task.get_config("test_split") or task.get_config("validation_split") for task in leaves}
    frozen = {
        "source": sources.name(name),
        "version": {task_name: task.VERSION for task_name, task in tasks["tasks"].items()},
        "split": sorted(map(str, splits)),
        "num_fewshot": sorted({task.get_config("num_fewshot") or 0 for task in leaves}),
        "output_type": sorted({str(task.OUTPUT_TYPE) for task in leaves}),
        "limit": limit,
        "n": documents,
        "requests": requests,
        "prompts": digest.hexdigest(),
        **({"chat_template": prepared.chat.identity} if prepared.chat else {}),
    }
    if files := sources.own.digest(_made_of(name, tasks)):
        frozen |= {"files": files, "rows": rows_digest(leaves, limit)}
    return replace(prepared, frozen=frozen, characters=characters)


def _no_data(name: str, error: Exception, sources: Sources) -> InputError:
    source = sources.name(name)
    if source == "own task":
        return sources.own.failed(name, error)
    reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:300]}"
    if source == "local files":
        return InputError(f"The local rows of the task {name!r} do not suit it", reason, _LAYOUT)
    if source != "lm-eval":
        return InputError(f"The shipped task {name!r} cannot be read", reason, "Reinstall cla-convert.")
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
    return InputError(
        f"The data of the task {name!r} cannot be loaded" + (" while offline" if offline else ""),
        why=("HF_HUB_OFFLINE is set, and the rows are not in the local cache. " if offline else "") + reason,
        fix=f"Use the offline pack ({', '.join(pack.names())}; eval.offline_pack: true), or local files (--task-data)"
        + (", or unset HF_HUB_OFFLINE where there is a network." if offline else ", or check the network and access."),
    )
