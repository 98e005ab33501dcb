"""Stock lm-eval tasks by name, without parsing all of its 14 000 YAML files: those of the folders that name them do."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..console import say

_DECLARED = re.compile(rb"^[\"']?(?:task|group|tag)[\"']?:[ \t]*[\"']?([\w.-]+)", re.MULTILINE)


def manager_for(names: set[str], own: Sequence[str | Path]) -> Any:
    """lm-eval's TaskManager, which knows what is in the folders `own` and those of `names` that are stock tasks."""
    from lm_eval.tasks import TaskManager

    if not names:
        return TaskManager(include_path=[*own], include_defaults=False)
    say(f"looking for {', '.join(sorted(names))} among the stock tasks of lm-eval ...")
    wanted, lacking = set[str](), set(names)
    while new := lacking - wanted:  # a group may consist of tasks in other folders
        wanted |= new
        folders = {name: _naming(name) for name in wanted}
        if not all(folders.values()):  # nobody knows one of them
            return TaskManager(include_path=[*own], include_defaults=False)
        # Only the documented arguments; later paths win: what is our own replaces the stock tasks of the same name.
        paths = sorted({str(folder) for found in folders.values() for folder in found})
        manager = TaskManager(include_path=[*paths, *own], include_defaults=False)
        lacking = {part for name in names for part in _lacking(manager, name)}
        if not lacking:
            return manager
    say("reading the list of all stock tasks of lm-eval, about half a minute ...")
    return TaskManager(include_path=[*own], include_defaults=True)


def declared() -> list[str]:
    """Names of stock tasks, groups and tags that stand in plain sight, for did-you-mean."""
    return sorted({name.decode() for text in _texts().values() for name in _DECLARED.findall(text)})


@cache
def _texts() -> dict[Path, bytes]:
    """lm-eval's YAML files and what is in them."""
    import lm_eval.tasks

    return {path: path.read_bytes() for path in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"))}


def _naming(name: str) -> set[Path]:
    """Folders of lm-eval's, of the first level, in which a file has `name` as a word."""
    import lm_eval.tasks

    root, word = Path(lm_eval.tasks.__file__).parent, name.encode()
    exactly = re.compile(rb"(?<![\w.-])" + re.escape(word) + rb"(?![\w.-])")
    found = {path.relative_to(root).parts for path, text in _texts().items() if word in text and exactly.search(text)}
    return {root / parts[0] for parts in found if len(parts) > 1}


def is_stock(name: str) -> bool:
    """Whether a file of lm-eval's has `name` as a word, as those that declare it do."""
    return bool(_naming(name))


def _lacking(manager: Any, name: str) -> set[str]:
    """What is not known of a task or, of a group, of all that it consists of."""
    return {one for one in {name} | parts_of(manager, name) if one not in manager.task_index}


def parts_of(manager: Any, name: str) -> set[str]:
    """Names of the tasks, groups and tags that a group or tag consists of, at any depth; none of a task."""
    listed: Any = None
    if name in manager.all_tags:
        listed = manager.task_index[name].tags
    elif name in manager.all_groups:
        listed = (manager.task_index[name].cfg or {}).get("task")
    found = set(_named(listed or [])) - {name}
    return found.union(*(parts_of(manager, part) for part in found))


def _named(parts: Any) -> Iterator[str]:
    """Of a group's list: tasks by their names, with settings, or groups that are written out in place."""
    for part in parts:
        inner = part.get("task", part.get("group")) if isinstance(part, dict) else part
        if isinstance(inner, list):
            yield from _named(inner)
        elif isinstance(inner, str):
            yield inner


def unscored_parts(manager: Any, name: str) -> list[str]:
    """The parts of a group that aggregates nothing, which are all that can be told of it; none of one that does.

    Nor of one that changes its parts: by themselves they would be others.
    """
    settings = manager.task_index[name].cfg or {}
    parts = settings.get("task") or []
    named = all(isinstance(part, str) and part != name for part in parts)
    return [] if settings.get("aggregate_metric_list") or not named else list(parts)
