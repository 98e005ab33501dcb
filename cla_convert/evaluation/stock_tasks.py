"""Stock lm-eval tasks by name, without parsing all of its 14 000 YAML files: those of the folders that name them do."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from ..console import say

_DECLARED = re.compile(rb"^[\"']?(?:task|group|tag)[\"']?:[ \t]*[\"']?([\w.-]+)", re.MULTILINE)


def manager_for(names: set[str], own: list[str]) -> Any:
    """lm-eval's TaskManager, which knows what is in the folders `own` and those of `names` that are stock tasks."""
    from lm_eval.tasks import TaskManager

    if not names:
        return TaskManager(include_path=own, include_defaults=False)
    say(f"looking for {', '.join(sorted(names))} among the stock tasks of lm-eval ...")
    texts = _texts()
    named = {name: _naming(name, texts) for name in names}
    folders = sorted({str(folder) for found in named.values() for folder in found})
    if not all(named.values()):  # nobody knows one of them: it is refused, with what is known
        return TaskManager(include_path=own, include_defaults=False)
    # Only the documented arguments; later paths win, so what is our own replaces the stock tasks of the same name.
    manager = TaskManager(include_path=[*folders, *own], include_defaults=False)
    if all(_whole(manager, name) for name in names):
        return manager
    say("reading the list of all stock tasks of lm-eval, about half a minute ...")
    return TaskManager(include_path=own, include_defaults=True)


def declared() -> list[str]:
    """Names of stock tasks, groups and tags that stand in plain sight, for did-you-mean."""
    return sorted({name.decode() for text in _texts().values() for name in _DECLARED.findall(text)})


@cache
def _texts() -> dict[Path, bytes]:
    """lm-eval's YAML files and what is in them."""
    import lm_eval.tasks

    return {path: path.read_bytes() for path in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"))}


def _naming(name: str, texts: dict[Path, bytes]) -> set[Path]:
    """Folders of lm-eval's, of the first level, in which a file has `name` as a word."""
    import lm_eval.tasks

    root, word = (
        Path(lm_eval.tasks.__file__).parent,
        re.compile(rb"(?<![\w.-])" + re.escape(name.encode()) + rb"(?![\w.-])"),
    )
    found = {
        path.relative_to(root).parts for path, text in texts.items() if name.encode() in text and word.search(text)
    }
    return {root / parts[0] for parts in found if len(parts) > 1}


def _whole(manager: Any, name: str) -> bool:
    """Whether a task is known and, of a group, all that it consists of."""
    if name not in manager.task_index:
        return False
    entry = manager.task_index[name]
    parts = (entry.cfg or {}).get("task") if name in manager.all_groups else None
    if not isinstance(parts, list):
        return True
    inner = [part.get("task", part.get("group")) if isinstance(part, dict) else part for part in parts]
    return all(isinstance(part, str) and _whole(manager, part) for part in inner)
