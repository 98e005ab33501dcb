"""A run: its recipe, its models, and the folder whose files its stages leave and find."""

import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from .environment import command_line, hardware, pick_device, versions
from .errors import InputError
from .files import read_json, write_bytes, write_json
from .recipe import Recipe
from .recipe_file import Resolved
from .same_recipe import check_same_recipe


@dataclass
class Run:
    """A run folder and what its stages share."""

    folder: Path
    recipe: Recipe
    source: Path
    """The source model as a local safetensors folder."""
    teacher: Path
    """The model to distil from: the source model unless train.teacher names another."""
    device: str
    allow_changes: Collection[str] = ()

    @classmethod
    def start(cls, resolved: Resolved, folder: Path, *, overwrite: bool, allow_changes: Collection[str] = ()) -> "Run":
        """Check that the folder may be used, find the models. Nothing is written yet."""
        from .models.source import resolve_source

        recipe = resolved.recipe
        check_same_recipe(folder, recipe, overwrite, allow_changes)
        device = pick_device(recipe.device)
        pickles = recipe.source.allow_pickle
        source = resolve_source(
            recipe.source.model, revision=recipe.source.revision, allow_pickle=pickles, to_convert=True
        )
        teacher = resolve_source(recipe.train.teacher, allow_pickle=pickles) if recipe.train.teacher else source
        return cls(folder, recipe, source, teacher, device, allow_changes)

    def save_recipe(self) -> None:
        """Mark the folder as a run, then write recipe.yaml by rename."""
        self.write("environment.json", self.read("environment.json") or {"stages": {}})
        text = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False)
        write_bytes(self.folder / "recipe.yaml", text.encode())

    @property
    def converted(self) -> Path:
        """The converted model."""
        return self.folder / "converted"

    @property
    def uptrained(self) -> Path:
        """The uptrained model."""
        return self.folder / "uptrained"

    @property
    def control(self) -> Path:
        """Folder of the control: the source model's own uptraining, laid out like the run folder."""
        return self.folder / "control"

    @property
    def points(self) -> dict[str, Path]:
        """The models to evaluate."""
        points = {"before": self.source, "converted": self.converted}
        if self.recipe.train.tokens:
            points["after"] = self.uptrained
        if self.recipe.train.needs_control:
            points["control"] = self.control / "uptrained"
        return points

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run folder; empty if it is not there."""
        return read_json(self.folder / name) or {}

    def write(self, name: str, value: dict[str, Any]) -> dict[str, Any]:
        """Write a JSON file of the run folder by rename."""
        write_json(self.folder / name, value)
        return value

    def _stage_seconds(self) -> dict[str, float]:
        """What environment.json says of earlier stages. Raises InputError if it is damaged."""
        stages = self.read("environment.json").get("stages", {})
        if not isinstance(stages, dict) or not all(isinstance(spent, (int, float)) for spent in stages.values()):
            raise InputError(
                f"{self.folder / 'environment.json'} is damaged", why="`stages` is not seconds by stage.",
                fix="Restore it, or remove that entry.",
            )  # fmt: skip
        return stages

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Record environment and the seconds spent in a stage (added up over resumed runs)."""
        started = time.monotonic()
        self._stage_seconds()  # a damaged file is found before the work
        try:
            yield
        finally:
            environment, stages = self.read("environment.json"), self._stage_seconds()
            stages[stage] = round(stages.get(stage, 0) + time.monotonic() - started, 1)
            environment.setdefault("started", datetime.now(UTC).isoformat(timespec="seconds"))
            environment |= {
                "command": command_line(),
                "versions": versions(),
                "hardware": hardware(),
                "device": self.device,
                "seeds": {"seed": self.recipe.seed},
                "stages": stages,
            }
            self.write("environment.json", environment)


def clear(folder: Path) -> None:
    """Remove what a run writes, by name, and nothing else."""
    for name in ("converted", "uptrained", "checkpoints", "control", "eval", "tensorboard", "wandb"):
        shutil.rmtree(folder / name, ignore_errors=True)
    results = ["recipe.yaml", "metrics.jsonl", "wandb.id", "report.md", "report.html"]
    results += [f"{name}.png" for name in ("loss", "sharing", "pareto", "bench")]
    results += [f"{name}.json" for name in ("plan", "convert", "train", "environment", "report", "bench")]
    for name in results:
        (folder / name).unlink(missing_ok=True)
