"""Exact checkpoints: everything that the next step depends on, published by rename.

A checkpoint is a folder `step-00000120` with one safetensors file for each kind of state (the trained parameters and
each of the optimisers' moments, all float32) and process, and state.json: step, tokens, what the run was started with,
and the sizes of the other files. It is written under a temporary name, synced and renamed, so a folder with the final
name is whole; the sizes guard against a disk that lost data anyway. Data order, learning rate and dropout need nothing
here: all are functions of the step.

Every process writes and reads its own rows of each tensor; of those that hold the same rows, one writes. A checkpoint
of several processes loads in one and the other way round: then the rows are put together and cut again. safetensors
rather than torch.distributed.checkpoint, whose index is a pickle: resuming in a folder from elsewhere must not run code
from it.
"""

import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from ..console import human_bytes, warn
from ..errors import TrainingError
from ..staging import sync
from ..version import __version__
from .continued import changes_told, differences, not_settings, refused, ways_on
from .parallel import Team
from .sharded import own_rows

_STATE = "state.json"
_TEMPORARY = ".tmp-"

T = TypeVar("T")
Optimizers = Sequence[torch.optim.Optimizer]


@dataclass(frozen=True)
class Position:
    """Where a run stands."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Time spent training so far, over all interruptions."""
    first_loss: float | None = None
    loss: float | None = None


class TrainingStates:
    """The checkpoints of one run, in `folder`. All processes of the team call the same methods."""

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        keep: int,
        *,
        team: Team = Team(),  # noqa: B008  (immutable)
        allow_changes: Collection[str] = (),
    ) -> None:
        """`identity` is what the results depend on (settings, data, models), as flat JSON values.

        `allow_changes` names entries of it that may differ from those of the checkpoint; `train` means `train.*`.
        """
        self.folder, self.keep, self.team, self.allow_changes = folder, keep, team, allow_changes
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        self.changes: list[dict[str, Any]] = []
        """What was changed in mid-run, and at which step."""
        self.resumed: list[dict[str, Any]] = []
        """The same of what is no setting: versions, processes, threads."""

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = sorted(self.folder.glob("step-*")) if self.folder.exists() else []
        return [path for path in found if _is_whole(path)]

    def at(self, step: int) -> Path:
        """Where the checkpoint of a step is, if there is one."""
        return self.folder / f"step-{step:08d}"

    def clear(self) -> None:
        """Remove every checkpoint: start over."""
        self.team.barrier()
        if self.team.leads:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.team.barrier()

    def save(self, position: Position, model: torch.nn.Module, optimizers: Optimizers) -> Path:
        """Publish a checkpoint, then prune. Raises TrainingError if the disk is full; earlier ones are untouched."""
        final = self.at(position.step)
        temporary = self.folder / f"{_TEMPORARY}{final.name}"
        if self.team.leads:
            for stale in self.folder.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(stale, ignore_errors=True)
        self.team.barrier()
        written = self._together(temporary, lambda: self._write_rows(temporary, model, optimizers))
        files = {name: size for sizes in self.team.collect(written) for name, size in sizes.items()}
        self._together(temporary, lambda: self._publish(temporary, final, position, files))
        return final

    def latest(self) -> Path | None:
        """The newest whole checkpoint, None if there is none.

        Raises:
            TrainingError: its run was another one, and not all that changed was allowed to.
        """
        return self.team.decide(self._latest() if self.team.leads else None)

    def load(self, path: Path, model: torch.nn.Module, optimizers: Optimizers) -> Position:
        """Put a checkpoint into the parameters and the optimisers, in place."""
        try:
            state = json.loads((path / _STATE).read_text())
            for kind, tensors in _state_tensors(model, optimizers).items():
                self._read_rows(path, kind, tensors, state.get("parts", state["environment"]["processes"]))
        except (OSError, RuntimeError, SafetensorError, ValueError, KeyError) as error:
            raise TrainingError(
                f"The checkpoint {path} cannot be read", str(error), "Remove it to resume from the one before."
            ) from error
        now, self.resumed = environment(self.team), list(state.get("resumed", []))
        if other := differences(now | state["environment"], now):  # what older versions did not save is as it is now
            warn(f"resuming with {changes_told(other)}: not bit-exact")
            self.resumed.append({"step": state["position"]["step"], "changed": other})
        return Position(**state["position"])

    def _together(self, temporary: Path, work: Callable[[], T]) -> T:
        """Do it on every process; if one fails, all raise the same error, and nothing half-written is left."""
        trouble, result = None, None
        try:
            result = work()
        except (OSError, RuntimeError, SafetensorError) as error:
            trouble = error
        if not (troubles := [found for found in self.team.collect(trouble and str(trouble)) if found]):
            return cast(T, result)
        if self.team.leads:
            shutil.rmtree(temporary, ignore_errors=True)
        raise self.disk_trouble(troubles[0]) from trouble

    def _write_rows(self, folder: Path, model: torch.nn.Module, optimizers: Optimizers) -> dict[str, int]:
        """Sizes of the files written: another machine's list of a shared folder may be old."""
        kinds, sizes = _state_tensors(model, optimizers), {}
        if not self.team.saves:
            return sizes
        folder.mkdir(parents=True, exist_ok=True)
        for kind, tensors in kinds.items():
            file = folder / _file_name(kind, self.team.part, self.team.shards)
            save_file({name: own_rows(tensor).detach().contiguous() for name, tensor in tensors.items()}, file)
            sync(file)
            sizes[file.name] = file.stat().st_size
        return sizes

    def _read_rows(self, folder: Path, kind: str, tensors: Mapping[str, torch.Tensor], saved_by: int) -> None:
        same = saved_by == self.team.shards
        numbers = [self.team.part] if same else range(saved_by)
        with ExitStack() as stack, torch.no_grad():
            files = [
                stack.enter_context(safe_open(folder / _file_name(kind, number, saved_by), framework="pt"))
                for number in numbers
            ]
            if set(files[0].keys()) != tensors.keys():
                raise ValueError("It is of another model: its parameters have other names.")
            for name, tensor in tensors.items():
                if tensor.ndim == 0 or same:  # a step count is the same everywhere
                    own_rows(tensor).copy_(files[0].get_tensor(name))
                    continue
                saved, mine = torch.cat([file.get_tensor(name) for file in files]), own_rows(tensor)
                start = 0 if mine is tensor else self.team.part * math.ceil(tensor.shape[0] / self.team.shards)
                mine.copy_(saved[start : start + mine.shape[0]])

    def _publish(self, temporary: Path, final: Path, position: Position, files: Mapping[str, int]) -> None:
        if not self.team.leads:
            return
        state = {
            "position": vars(position),
            "identity": self.identity,
            "changes": self.changes,
            "resumed": self.resumed,
            "environment": environment(self.team),
            "parts": self.team.shards,
            "files": files,
        }
        (temporary / _STATE).write_text(json.dumps(state, indent=2))
        sync(temporary / _STATE)
        sync(temporary)
        if final.exists():  # only a broken one can be there: the loop never saves a step twice
            shutil.rmtree(final)
        temporary.rename(final)
        sync(self.folder)
        self._prune()

    def _latest(self) -> Path | None:
        whole = self.all()
        for damaged in sorted(set(self.folder.glob("step-*")) - set(whole)):
            warn(f"{damaged} is damaged: files are missing or of the wrong size")
        if not whole:
            return None
        saved = json.loads((whole[-1] / _STATE).read_text())
        self.changes = list(saved.get("changes", []))
        if changed := differences(saved["identity"], self.identity):
            self._check_allowed(changed)
            self.changes.append({"step": saved["position"]["step"], "changed": changed})
            warn(f"resuming with {changes_told(changed)}: the result is that of neither setting alone")
        return whole[-1]

    def _check_allowed(self, changed: list[dict[str, Any]]) -> None:
        if not (wrong := refused(changed, self.allow_changes)):
            return
        names = [change["name"] for change in wrong]
        raise TrainingError(
            f"The checkpoints in {self.folder} belong to another run",
            f"Changed since: {changes_told(wrong)}{not_settings(names)}",
            ways_on(names),
        )

    def disk_trouble(self, error: str) -> TrainingError:
        """What to tell the user when the run folder cannot be written to."""
        whole = self.all()
        kept = f"The last good checkpoint is kept: {whole[-1]}" if whole else "There is no earlier checkpoint."
        free = human_bytes(shutil.disk_usage(self.folder.parent).free)
        return TrainingError(
            f"{self.folder.parent} cannot be written to",
            f"{error} ({free} free). {kept}",
            "Free some space and run the same command again: it resumes.",
        )

    def _prune(self) -> None:
        """Drop the oldest beyond `keep`, renamed first: a half-removed one must not look whole."""
        for path in self.all()[: -self.keep]:
            doomed = path.with_name(f"{_TEMPORARY}{path.name}")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def environment(team: Team) -> dict[str, Any]:
    """What, besides the identity, decides the last bits of a float: recorded, and warned about when it changes."""
    here = {"torch": torch.__version__, "transformers": transformers.__version__, "cla-convert": __version__}
    replicas = team.size // team.shards if team.replicated else 1
    return {**here, "threads": torch.get_num_threads(), "processes": team.size, "replicas": replicas}


def _state_tensors(model: torch.nn.Module, optimizers: Optimizers) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint holds: kind (`model`, `exp_avg`, ...) -> name of the parameter -> the tensor in use."""
    kinds = {"model": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}}
    moments: Any = get_optimizer_state_dict(model, optimizers)["state"]
    for name, values in moments.items():
        for kind, value in values.items():
            kinds.setdefault(kind, {})[name] = value
    return kinds


def _file_name(kind: str, part: int, parts: int) -> str:
    return f"{kind}-{part + 1:05d}-of-{parts:05d}.safetensors"


def _is_whole(path: Path) -> bool:
    try:
        sizes = json.loads((path / _STATE).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False
