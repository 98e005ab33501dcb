"""Exact checkpoints: everything that the next step depends on, published by rename.

A checkpoint is a folder `step-00000120` with the trained parameters in float32 (safetensors), the optimiser and the
random number generators (torch, loaded with weights_only), and state.json: step, tokens, what the run was started
with, and the sizes of the other files. It is written under a temporary name, synced and renamed, so a folder with the
final name is whole; the sizes guard against a disk that lost data anyway. Data order and learning rate need nothing
here: both are functions of the step.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..console import human_bytes, warn
from ..errors import TrainingError
from ..files import sync

_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.pt", "state.json"
_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Position:
    """Where a run stands."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Time spent training so far, over all interruptions."""
    first_loss: float | None = None
    loss: float | None = None


class Checkpoints:
    """The checkpoints of one run, in `folder`."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int) -> None:
        """`identity` is what the results depend on (settings, data, models), as flat JSON values."""
        self.folder, self.keep = folder, keep
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = sorted(self.folder.glob("step-*")) if self.folder.exists() else []
        return [path for path in found if _is_whole(path)]

    def clear(self) -> None:
        """Remove every checkpoint: start over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(
        self, position: Position, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> Path:
        """Publish a checkpoint, then prune. Raises TrainingError if the disk is full; earlier ones are untouched."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary, final = self.folder / f"{_TEMPORARY}{os.getpid()}", self.folder / f"step-{position.step:08d}"
        try:
            self._write(temporary, position, parameters, optimizer)
            if final.exists():  # only a broken one can be there: the loop never saves a step twice
                shutil.rmtree(final)
            temporary.rename(final)
            sync(self.folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._cannot_save(error) from error
        self._prune()
        return final

    def latest(self) -> Path | None:
        """The newest whole checkpoint, None if there is none. Raises TrainingError if its run was another one."""
        whole = self.all()
        if not whole:
            return None
        saved = json.loads((whole[-1] / _STATE).read_text())["identity"]
        if changed := differences(saved, self.identity):
            raise TrainingError(
                f"The checkpoints in {self.folder} belong to another run",
                "Changed since: " + "; ".join(changed),
                "Set it back to resume, give another folder, or start over (uptrain: --no-resume; run: --overwrite).",
            )
        return whole[-1]

    def load(self, path: Path, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> Position:
        """Put a checkpoint into the parameters (in place), the optimiser and the random number generators."""
        try:
            tensors = load_file(path / _MODEL)
            rest = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
            state = json.loads((path / _STATE).read_text())
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise TrainingError(
                f"The checkpoint {path} cannot be read", str(error), "Remove it to resume from the one before."
            ) from error
        if tensors.keys() != parameters.keys():
            raise TrainingError(f"The checkpoint {path} is of another model", "Its parameters have other names.")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        optimizer.load_state_dict(rest["optimizer"])
        _restore_rng(rest["rng"])
        if state["environment"] != environment():
            warn(f"resuming under {environment()}, saved under {state['environment']}: not bit-exact")
        return Position(**state["position"])

    def _write(
        self,
        folder: Path,
        position: Position,
        parameters: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        folder.mkdir()
        save_file({name: tensor.detach().contiguous() for name, tensor in parameters.items()}, folder / _MODEL)
        torch.save({"optimizer": optimizer.state_dict(), "rng": _rng()}, folder / _OPTIMIZER)
        state = {
            "position": vars(position),
            "identity": self.identity,
            "environment": environment(),
            "files": {name: (folder / name).stat().st_size for name in (_MODEL, _OPTIMIZER)},
        }
        (folder / _STATE).write_text(json.dumps(state, indent=2))
        for file in folder.iterdir():
            sync(file)
        sync(folder)

    def _cannot_save(self, error: Exception) -> TrainingError:
        whole = self.all()
        kept = f"The last good checkpoint is kept: {whole[-1]}" if whole else "There is no earlier checkpoint."
        free = human_bytes(shutil.disk_usage(self.folder).free)
        return TrainingError(
            f"A checkpoint could not be written to {self.folder}",
            f"{error} ({free} free). {kept}",
            "Free some space and run the same command again: it resumes.",
        )

    def _prune(self) -> None:
        """Drop the oldest beyond `keep`, renamed first: a half-removed one must not look whole."""
        for path in self.all()[: -self.keep]:
            doomed = path.with_name(f"{_TEMPORARY}{path.name}")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What changed between two identities, as `name: old -> new`."""
    names = sorted(saved.keys() | current.keys())
    return [f"{n}: {saved.get(n)!r} -> {current.get(n)!r}" for n in names if saved.get(n) != current.get(n)]


def environment() -> dict[str, Any]:
    """What, besides the identity, decides the last bits of a float: recorded, and warned about when it changes."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def _is_whole(path: Path) -> bool:
    try:
        sizes = json.loads((path / _STATE).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _rng() -> dict[str, Any]:
    """Dropout draws from torch's generators; nothing in the loop uses Python's or numpy's global ones."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _restore_rng(rng: Mapping[str, Any]) -> None:
    torch.set_rng_state(rng["cpu"])
    if rng["cuda"] and len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])
