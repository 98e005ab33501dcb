"""TensorBoard and Weights & Biases, through their own libraries: extras, asked for by train.log_to."""

import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from ..errors import InputError
from ..run_folder import TrainingFolder


class Tracker(Protocol):
    """Takes rows of metrics.jsonl."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Record the numbers of one row at its `step`."""
        ...

    def close(self) -> None:
        """Write out what is pending."""
        ...


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError for a tracker whose library is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise InputError(
                f"train.log_to names {name}, which is not installed",
                fix=f"pip install 'cla-convert[{name}]', or leave it out.",
            )


def open_trackers(names: Sequence[str], folder: TrainingFolder, step: int, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of a run in `folder` that continues after `step` (0: a new one); `config` describes the run."""
    makers = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    return [makers[name](folder, step, config) for name in names]


class TensorBoard:
    """Event files; those of an earlier attempt count up to the step that was resumed from."""

    def __init__(self, folder: TrainingFolder, step: int, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder.tensorboard), purge_step=step + 1)
        if not step:
            self._writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def log(self, row: Mapping[str, Any]) -> None:
        """One scalar per number, as `train/NAME`."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(f"train/{name}", value, row["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of project `cla-convert`, under the library's own settings (WANDB_MODE, ...); resuming continues it."""

    def __init__(self, folder: TrainingFolder, step: int, config: Mapping[str, Any]) -> None:
        import wandb

        name = folder.wandb_id
        if not step or not name.exists():
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project="cla-convert",
            name=folder.path.name,
            id=name.read_text(),
            resume="allow",
            dir=folder.path,
            config=dict(config),
        )

    def log(self, row: Mapping[str, Any]) -> None:
        """All numbers of a row."""
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
