"""What must be alike in every process of a training, on however many machines: checked before the first step."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..recipe import Train
from .continued import differences
from .parallel import Team


def check_alike(team: Team, train: Train, identity: Mapping[str, Any], folder: Path) -> None:
    """Check that all processes have one folder, and the same settings, models and text. All of them must ask.

    Args:
        team: the processes.
        train: the recipe's section.
        identity: what the weights at the end depend on, see `run_identity`.
        folder: where checkpoints go.

    Raises:
        InputError: they do not.
    """
    if team.size == 1:
        return
    team.barrier()  # one machine may take much longer to load
    mine = {f"train.{name}": value for name, value in train.model_dump(mode="json").items()}
    mine |= {**identity, "torch": torch.__version__}
    first, *others = team.collect(mine)
    for number, other in enumerate(others, 1):
        if found := differences(first, other):
            raise InputError(
                f"Process {number} trains something else than process 0",
                "; ".join(f"{one['name']}: {one['after']!r} instead of {one['before']!r}" for one in found) + ".",
                "Give every machine the same command, models and text. What is sampled or tokenised on each alone may "
                "differ: let CLA_CONVERT_CACHE name a folder that they share.",
            )
    _check_folder(team, folder)


def _check_folder(team: Team, folder: Path) -> None:
    mark = folder / f".shared-{team.decide(uuid.uuid4().hex)}"
    if team.leads:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    team.barrier()
    seen = team.collect(mark.exists())  # a name that nobody has looked for, so no network file system remembers it
    if team.leads:
        mark.unlink(missing_ok=True)
    if not all(seen):
        raise InputError(
            f"{folder} is not the same folder for all processes",
            f"What process 0 writes there, process {seen.index(False)} does not see.",
            "Give an output folder on a file system that all machines share: each writes its part of a checkpoint.",
        )
