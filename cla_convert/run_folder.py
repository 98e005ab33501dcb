"""The folder of a run: the only place that knows what lies where in it.

    recipe.yaml environment.json           what is wanted; where and how it is made
    plan.json convert.json                 what conversion will do, and did
    converted/ uptrained/                  the models
    train.json metrics.jsonl checkpoints/  of uptraining; with trackers tensorboard/, wandb/ and wandb.id
    control/                               the same of the source model's own uptraining
    eval/                                  batch_size.json comparison.json domains.json, and a folder a point
    report.json report.md report.html bench.json bench.md *.png

A file that is not there is None: its stage did not run. A damaged one is an InputError that names it. What the files
hold: results.py.
"""

import os
import shutil
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import yaml

from .files import alone_in, check_free, existing, path_of, write_bytes
from .recipe import Recipe
from .results import ConvertResult, Domains, Environment, KvCache, PlanResult, PointResult, Stored, TrainResult

POINTS = ("before", "converted", "after", "control")
"""The points of measurement: source model, right after conversion, after uptraining; and the source model uptrained
on the same tokens, where a control was asked for."""
RECIPE = "recipe.yaml"
"""What is wanted, of a run; a model's folder holds a copy."""
TEXTS = {
    "held_out": "held-out text", "domains": "domains", "answers": "answers", "agreement": "KL to the source",
}  # fmt: skip
"""What a point measures on text, in words; the files that a recipe names apart."""
PICTURES = ("loss", "sharing", "pareto", "learning", "bench")


@dataclass(frozen=True)
class TrainingFolder:
    """What uptraining one model leaves: in a run folder, in its control/, or beside the output of `uptrain`."""

    path: Path
    model: Path
    """Where the uptrained model goes."""

    @property
    def checkpoints(self) -> Path:
        """Folder of training states."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """A row a step."""
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Stored[TrainResult]:
        """Written once the model is published."""
        return Stored(self.path / "train.json", TrainResult)

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def wandb_id(self) -> Path:
        """The id of a Weights & Biases run; the library makes wandb/ beside it."""
        return self.path / "wandb.id"

    def finish(self, *, keep: bool) -> None:
        """Remove the checkpoints of a model that is published and recorded, unless they are to be kept."""
        if not keep:
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def clear(self) -> None:
        """Remove what uptraining writes."""
        _remove(self.model, self.checkpoints, self.tensorboard, self.wandb_id.with_name("wandb"))
        _remove(self.metrics, self.result.path, self.wandb_id)


@dataclass(frozen=True)
class PointFolder:
    """What was measured on one model."""

    path: Path

    @property
    def results(self) -> Stored[PointResult]:
        """Scores of all tasks; written when the last one is finished."""
        return Stored(self.measured("results"), PointResult)

    @property
    def kv_cache(self) -> Stored[KvCache]:
        """The cache of a real `generate`."""
        return Stored(self.measured("kv_cache"), KvCache)

    @property
    def text_files(self) -> dict[str, Path]:
        """What was measured on text files, by their names."""
        return {file.stem: file for file in sorted((self.path / "perplexity").glob("*.json"))}

    @property
    def compared_texts(self) -> dict[str, Path]:
        """How far the model is from the source on text files, by their names."""
        return {file.stem: file for file in sorted((self.path / "agreement").glob("*.json"))}

    @property
    def task_files(self) -> list[Path]:
        """Every document of each task that was measured."""
        return sorted((self.path / "tasks").glob("*.json"))

    def measured(self, name: str) -> Path:
        """A file of the point: results, kv_cache; of TEXTS; or perplexity/NAME or agreement/NAME."""
        return self.path / f"{name}.json"

    def keep_texts(self, names: Collection[str]) -> None:
        """Remove what was measured on text, but for `names`."""
        measured = [*TEXTS, *(f"perplexity/{name}" for name in self.text_files)]
        measured += [f"agreement/{name}" for name in self.compared_texts]
        _remove(*(self.measured(name) for name in measured if name not in names))

    def task(self, name: str) -> Path:
        """Every document of a task."""
        return self.path / "tasks" / f"{name.replace('/', '__')}.json"


@dataclass(frozen=True)
class EvaluationFolder:
    """The measurements of all points."""

    path: Path

    @property
    def batch_size(self) -> Path:
        """The one of all points, see evaluation/batch.py."""
        return self.path / "batch_size.json"

    @property
    def comparison(self) -> Path:
        """The statistics of before against the last point, see evaluation/comparison.py."""
        return self.path / "comparison.json"

    @property
    def domains(self) -> Stored[Domains]:
        """Which domains the run's text touched."""
        return Stored(self.path / "domains.json", Domains)

    def point(self, name: str) -> PointFolder:
        """The measurements of one point."""
        return PointFolder(self.path / name)


class RunFolder:
    """A run: where everything lies, and which local folders its recipe's models are."""

    def __init__(
        self, path: Path | str, *, converted: Path | None = None, training: TrainingFolder | None = None
    ) -> None:
        """In folder `path`; a verb that is given single models says where these lie: see `of_uptraining`."""
        self.path = path = Path(path)
        self.converted = converted or path / "converted"
        """The converted model."""
        self.training = training or TrainingFolder(path, path / "uptrained")
        """Its uptraining."""
        self.converts = training is None
        """Whether the converted model is made here, and not given."""
        self._found: dict[tuple[str, str | None], Path] = {}

    @classmethod
    def around(cls, path: Path) -> "RunFolder | None":
        """The run that something lies in or is, if any: by its name, or behind links."""
        named = Path(os.path.normpath(path.absolute()))  # `run/../other` is not in run
        places = (path, *named.parents, *path.resolve().parents)
        return next((run for run in map(cls, places) if run.begun), None)

    @classmethod
    def of_uptraining(cls, student: Path, model: Path) -> "RunFolder":
        """Where uptraining `student` into `model` keeps its files: the run that `model` is of, or else MODEL.state."""
        for run in (cls(model.parent), cls(model.parent.parent)):
            for training in (run.training, run.control):
                if run.begun and training.model == model:
                    run.converted, run.training = student, training
                    return run
        state = model.with_name(f"{model.name}.state")
        return cls(state, converted=student, training=TrainingFolder(state, model))

    @property
    def recipe(self) -> Path:
        """The recipe, resolved."""
        return self.path / RECIPE

    @property
    def environment(self) -> Stored[Environment]:
        """Where and how it is made; marks the folder as a run."""
        return Stored(self.path / "environment.json", Environment)

    @property
    def plan(self) -> Stored[PlanResult]:
        """What conversion will do."""
        return Stored(self.path / "plan.json", PlanResult)

    @property
    def convert(self) -> Stored[ConvertResult]:
        """What it did; written once the model is published."""
        return Stored(self.path / "convert.json", ConvertResult)

    @property
    def control(self) -> TrainingFolder:
        """Uptraining of the source model."""
        return TrainingFolder(self.path / "control", self.path / "control" / "uptrained")

    @property
    def evaluation(self) -> EvaluationFolder:
        """All measurements."""
        return EvaluationFolder(self.path / "eval")

    @property
    def last_point(self) -> str:
        """The point to compare with `before`, measured or not: `after`, or `converted` where nothing was trained."""
        trained = self.training.result.path.exists() or self.evaluation.point("after").results.path.exists()
        return "after" if trained else "converted"

    @property
    def report(self) -> Path:
        """What the report says, for programs."""
        return self.path / "report.json"

    @property
    def pages(self) -> dict[str, Path]:
        """The same for people, by format."""
        return {ending: self.path / f"report.{ending}" for ending in ("md", "html")}

    @property
    def bench(self) -> Path:
        """What `bench --out` measured."""
        return self.path / "bench.json"

    @property
    def bench_page(self) -> Path:
        """The same for people."""
        return self.path / "bench.md"

    def picture(self, name: str) -> Path:
        """One of PICTURES."""
        assert name in PICTURES, "a picture that `clear` does not know would outlive its run"
        return self.path / f"{name}.png"

    @property
    def begun(self) -> bool:
        """Whether a run was begun here."""
        return self.recipe.exists() and self.environment.path.exists()

    @property
    def has_work(self) -> bool:
        """Whether there is anything that another recipe would have made otherwise."""
        trained = (path for t in (self.training, self.control) for path in (t.model, t.checkpoints))
        return self.converted.exists() or any(path.exists() for path in trained)

    @property
    def shown(self) -> list[Path]:
        """Every file that a report may show."""
        patterns = ("*.json", "*.jsonl", "*.yaml", "control/*.json*", "eval/*.json", "eval/*/*.json", "eval/*/*/*.json")
        return [file for pattern in patterns for file in self.path.glob(pattern)]

    def made_by(self, stage: str) -> dict[Path, int]:
        """What there is of a stage's results, and when each was written."""
        files = {
            "plan": [self.plan.path],
            "convert": [self.convert.path],
            "uptrain": [file for of in (self.training, self.control) for file in (of.metrics, of.result.path)],
            "eval": [*self.evaluation.path.glob("*/**/*.json")],
            "report": [*self.pages.values()],
        }
        return {file: file.stat().st_mtime_ns for file in files[stage] if file.exists()}

    def source(self, recipe: Recipe) -> Path:
        """The source model as a local safetensors folder, found (downloaded, dequantised) once. Raises InputError."""
        return self._find(recipe, recipe.source.model, recipe.source.revision, to_convert=True)

    def teacher(self, recipe: Recipe) -> Path:
        """The model to distil from: the source model unless train.teacher names another. Raises InputError."""
        other = recipe.train.teacher
        return self._find(recipe, other, None, to_convert=False) if other else self.source(recipe)

    def points(self, recipe: Recipe) -> dict[str, Path]:
        """The models to evaluate."""
        points = {"before": self.source(recipe), "converted": self.converted}
        if recipe.train.tokens:
            points["after"] = self.training.model
        if recipe.train.needs_control:
            points["control"] = self.control.model
        return points

    def alone(self) -> AbstractContextManager[None]:
        """Lock the folder, made if need be. Raises InputError if another process is at work in it."""
        return alone_in(self.path)

    def save_recipe(self, recipe: Recipe) -> None:
        """Mark the folder as a run, then write the recipe."""
        self.environment.write(self.environment.read() or Environment(stages={}))
        write_bytes(self.recipe, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).encode())

    def lost_with(self, recipe: Recipe) -> Path | None:
        """A model or text that the recipe reads and `clear` would remove: this run's control can be a source."""
        named = [path_of(place) for _, place in recipe.places]
        places = [place.resolve() for place in named if place.exists()]
        cleared = (self.training.model, self.converted, self.control.path, self.evaluation.path)
        return next((one for one in places if any(one.is_relative_to(gone.resolve()) for gone in cleared)), None)

    def clear(self) -> None:
        """Remove what a run writes, by name, and nothing else."""
        self.training.clear()
        _remove(self.converted, self.control.path, self.evaluation.path)
        _remove(self.recipe, self.environment.path, self.plan.path, self.convert.path)
        _remove(self.report, *self.pages.values(), self.bench, self.bench_page, *map(self.picture, PICTURES))

    def _find(self, recipe: Recipe, model: str, revision: str | None, *, to_convert: bool) -> Path:
        from .models.source import resolve_source

        if (model, revision) not in self._found:
            self._found[model, revision] = resolve_source(
                model,
                revision=revision,
                allow_pickle=recipe.source.allow_pickle,
                to_convert=to_convert,
                text_only=recipe.source.text_only,
            )
        return self._found[model, revision]


def alone_around(out: Path) -> AbstractContextManager[None]:
    """Lock the run that `out` lies in or is, if any. Raises InputError if another process is at work in it."""
    if run := RunFolder.around(out):
        return alone_in(run.path)
    check_free(existing(out))  # of a run that still reads its text there is an empty folder, and its lock
    return nullcontext()


def _remove(*paths: Path) -> None:
    """Files and folders that may not be there."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
