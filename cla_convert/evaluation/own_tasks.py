"""Tasks of the user's own (`eval.include_path`): a folder of lm-eval's YAML files, and the Python that they name.

lm-eval passes over files that it cannot read, and over the second of two with the same name, without a word; here each
is a mistake that is said before any work. What a task is made of is hashed: its YAML, those it includes, all Python of
the folder, and the rows that it asks about.
"""

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, UsageError, first_line
from ..files import looked_in, path_of
from ..refusals import unread
from . import retrieval
from .stock_tasks import parts_of

_SKIPPED = {"__pycache__", ".ipynb_checkpoints"}
"""Folders that lm-eval does not look into either."""
_LONGEST_NAME = 200
"""Bytes: a file has it."""


class _Loader(yaml.SafeLoader):
    """What lm-eval reads: YAML, and functions by their names."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


@dataclass(frozen=True)
class OwnTasks:
    """What a folder declares."""

    folder: Path | None = None
    manager: Any = None
    """lm-eval's TaskManager, of this folder alone."""
    files: dict[str, list[Path]] = field(default_factory=dict)
    """The YAML files of a task or group, by its name: the one that declares it, and those that this includes."""

    @classmethod
    def of(cls, place: str | None) -> "OwnTasks":
        """Read the YAML files below a folder.

        Raises:
            InputError: it is no folder, holds no task, or a file in it cannot be read.
            UsageError: a name that is taken, or is none.
        """
        if place is None:
            return cls()
        folder = path_of(place)
        if not folder.is_dir():
            raise InputError(
                f"There is no folder {folder}", looked_in(folder), "Check eval.include_path (--include-path)."
            )
        files: dict[str, list[Path]] = {}
        for path in _below(folder, "yaml"):
            settings, chain = _read(path, ())
            if not settings.keys() & {"task", "group", "class"}:  # for others to include
                continue
            name = _name(settings.get("group") or settings.get("task"), path)
            if name in files:
                raise UsageError(
                    f"The task {name!r} is declared twice", f"In {files[name][0]} and in {path}.", "Rename one of them."
                )
            files[name] = chain
        if not files:
            raise InputError(
                f"{folder} holds no tasks",
                why="No file in it ends in .yaml and has one of the keys task and group.",
                fix="See docs/evaluation.md; eval.include_path is a folder of lm-eval's YAML files.",
            )
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=[str(folder)], include_defaults=False)
        for name, chain in files.items():
            if name not in manager.task_index:  # which it does not say
                raise InputError(
                    f"lm-eval does not read {chain[0]}",
                    why="It passes over files that it cannot use, such as those that include a file by two ways.",
                    fix="Include every file once, and see docs/evaluation.md for an example.",
                )
        return cls(folder, manager, files)

    @property
    def names(self) -> set[str]:
        """Tasks, groups and tags."""
        return set(self.manager.task_index) if self.manager else set()

    def parts(self, name: str) -> set[str]:
        """A task of this folder, or a group or tag and all that it consists of; nothing for any other name."""
        return {name} | parts_of(self.manager, name) if name in self.names else set()

    def digest(self, names: Iterable[str]) -> str | None:
        """Hash of the files that a task is made of, wherever the folder lies; None for one that has none of it.

        Args:
            names: its own, and those of the tasks and groups that it was built of.
        """
        own = {part for name in names for part in self.parts(name)}
        if self.folder is None or not own & self.names:
            return None
        named = {file for part in own for file in self.files.get(part, [])}
        files = named | set(_below(self.folder, "py"))
        return hashlib.sha256(b"".join(sorted(hashlib.sha256(p.read_bytes()).digest() for p in files))).hexdigest()

    def failed(self, name: str, error: Exception) -> InputError:
        """The refusal of a task of this folder that lm-eval cannot build or score."""
        where = next(iter(self.files.get(name, [])), self.folder)
        return InputError(
            f"The task {name!r} of {where} cannot be used",
            why=f"{type(error).__name__}: {first_line(error)[:300]}",
            fix="Correct the file, or what it names: data (dataset_path), functions, metrics. CLA_DEBUG=1 shows all.",
        )


def _below(folder: Path, ending: str) -> list[Path]:
    found = folder.resolve().glob(f"**/*.{ending}")
    return sorted(path for path in found if not _SKIPPED & set(path.parts))


def _name(name: Any, path: Path) -> str:
    """Raises UsageError for what cannot be the name of a task, and of the file with its results."""
    fits = isinstance(name, str) and name.isprintable() and 0 < len(name.encode()) <= _LONGEST_NAME
    if not fits or Path(name).name != name or "\\" in name:
        raise UsageError(
            f"{repr(name)[:80]} in {path} cannot be the name of a task", fix="Give it a short name without slashes."
        )
    if name in retrieval.names():
        raise UsageError(f"{path} declares {name!r}, which is a task of cla-convert", fix="Give it another name.")
    return name


def _read(path: Path, through: tuple[Path, ...]) -> tuple[dict[str, Any], list[Path]]:
    """The settings in a file with those that it includes beneath them; and all files read. Raises InputError."""
    if path in through:
        raise InputError(f"{path} includes itself", fix="Take the line with include out.")
    what = f"{path} cannot be read" if not through else f"{path}, which {through[-1]} includes, cannot be read"
    try:
        settings = yaml.load(path.read_bytes(), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(what, f"{line}{error.problem or first_line(error)}.", "Correct the YAML.") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise unread(error, InputError(what, first_line(error))) from error
    if not isinstance(settings, dict):
        raise InputError(what, "It holds no settings.", "See docs/evaluation.md for an example.")
    included = settings.pop("include", [])
    merged, files = dict[str, Any](), [path]
    for name in included if isinstance(included, list) else [included]:
        if not isinstance(name, str) or not name.isprintable():
            raise InputError(what, f"include names {repr(name)[:80]}, which is no file.", "Name a YAML file.")
        inner, more = _read((path.parent / name).resolve(), (*through, path))
        merged |= inner
        files += more
    return merged | settings, files


def rows_digest(tasks: Iterable[Any], limit: int | None) -> str:
    """Hash of the documents that tasks ask about, answers and all: prompts do not tell the right one of several."""
    found = hashlib.sha256()
    for task in tasks:
        for number, row in task.doc_iterator(limit=limit, rank=0, world_size=1):
            text = json.dumps([task.task_name, number, row], sort_keys=True, default=repr)
            found.update(text.encode())
    return found.hexdigest()


def rehearse(task: Any) -> None:
    """Score the first document as if the model had answered it, so that mistakes in doing so come before the work.

    Raises whatever the task's filters and metrics do.
    """
    unknown = [name for name, function in getattr(task, "_metric_fn_list", {}).items() if function is None]
    if unknown and not callable(task.get_config("process_results")):
        raise ValueError(f"there is no metric {unknown[0]}")
    choices = task.get_config("doc_to_choice")
    listed = choices.values() if isinstance(choices, dict) else choices if isinstance(choices, list) else ()
    if any("{{" in str(choice) for choice in listed):
        raise ValueError('doc_to_choice is a list, which lm-eval takes as it stands: write "{{[one, other]}}" instead')
    first = task.instances[0]
    asked = [copy.copy(one) for one in task.instances if one.doc_id == first.doc_id]
    for one in asked:
        one.resps, one.filtered_resps = [_response(task, one)] * max(1, one.repeats or 1), {}
    for filters in getattr(task, "_filters", []):
        filters.apply(asked)
    for name in asked[0].filtered_resps:
        metrics = task.process_results(first.doc, [one.filtered_resps[name] for one in asked])
        for metric, value in metrics.items():
            _rehearse_aggregation(task, metric, value)


def _rehearse_aggregation(task: Any, metric: str, value: Any) -> None:
    """Of two such documents, as lm-eval does it once all of them are answered: by the mean where nothing is said."""
    from lm_eval.api.metrics import mean

    aggregate = task.aggregation().get(metric, mean)
    if not callable(aggregate):
        raise ValueError(f"there is no such aggregation for the metric {metric}")
    try:
        aggregate([value, value])
    except (NameError, ImportError, AttributeError):
        raise
    except TypeError as error:
        if metric in task.aggregation():
            raise
        raise ValueError(
            f"process_results gives the metric {metric}, which has no aggregation in metric_list, and values like "
            f"{value!r} have no mean"
        ) from error
    except Exception:  # two equal documents may be too few for it: a correlation, say
        return


def _response(task: Any, request: Any) -> Any:
    """What a model could answer: where it writes, what it should."""
    if request.request_type != "generate_until":
        return -1.0 if request.request_type == "loglikelihood_rolling" else (-1.0, False)
    target = task.doc_to_target(request.doc)
    if isinstance(target, list):
        target = next(iter(target), "")
    return str(target)
