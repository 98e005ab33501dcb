"""`cla-convert run`: recipe -> plan -> convert -> uptrain -> evaluate -> report, over one run folder.

Every stage leaves its result in the run folder by rename and is skipped when that result is there, so the same command
line resumes after any interruption. This file holds the order of things; each stage lives in its own package.
"""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from .console import say
from .environment import command_line, hardware, pick_device, versions
from .files import alone_in, read_json, write_json
from .recipe import Recipe, Resolved
from .same_recipe import check_same_recipe

STAGES = ["plan", "convert", "uptrain", "eval", "report"]
DEFAULT_BUDGET = 0.5
"""Of `sharing: auto`."""
CPU_CALIBRATION = 24_576
"""Calibration tokens at most on a CPU: minutes for a 135M model on two cores."""


def run(
    resolved: Resolved,
    out: Path,
    *,
    until: str = "report",
    overwrite: bool = False,
    allow_changes: Collection[str] = (),
) -> dict[str, Any]:
    """Do the stages up to `until` in the run folder `out` and return what the last one made.

    Raises:
        UsageError: the folder holds a run of another recipe.
        InputError, TrainingError, Interrupted: from the stages; what is finished stays.
    """
    stages: dict[str, Callable[[Run], dict[str, Any]]] = {
        "plan": plan,
        "convert": convert,
        "uptrain": uptrain,
        "eval": evaluate,
        "report": report,
    }
    run = Run.start(resolved, out, overwrite=overwrite, allow_changes=allow_changes)
    say(resolved.table())
    check_before_work(run)
    with alone_in(out):
        if overwrite:
            _clear(out)  # only now: a run that cannot start must not cost the one before it
        run.save_recipe()
        result: dict[str, Any] = {}
        for number, (name, stage) in enumerate(stages.items(), 1):
            say(f"\n[{number}/{len(stages)}] {name}")
            with run.timed(name):
                result = stage(run)
            if name == until:
                break
        return result


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
        """Open or create the run folder, save the resolved recipe, find the source model."""
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
        temporary = self.folder / ".recipe.yaml.partial"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.folder / "recipe.yaml")

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

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Record environment and the seconds spent in a stage (added up over resumed runs)."""
        started = time.monotonic()
        try:
            yield
        finally:
            environment = self.read("environment.json")
            stages = environment.get("stages", {})
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


def check_before_work(run: Run) -> None:
    """Find out now what would otherwise fail after hours: tasks, text, tokenizer, disk."""
    from .evaluation.backend import check_backend
    from .evaluation.harness import check_tasks
    from .evaluation.texts import check_texts
    from .models.export import load_tokenizer
    from .models.writer import check_disk
    from .training.parameters import check_optimizer
    from .training.teacher import check_teacher
    from .training.trackers import check_trackers

    check_backend(run.recipe.eval, run.device)
    check_tasks(run.recipe.eval, run.source, run.recipe.seed)
    check_texts(run.recipe.eval.perplexity)
    load_tokenizer(run.source)
    if run.recipe.train.tokens:
        check_trackers(run.recipe.train.log_to)
        check_optimizer(run.recipe.train)
        check_teacher(run.recipe.train, run.source, run.teacher)
    text(run)
    check_disk(run.folder, _disk_needed(run))


def plan(run: Run) -> dict[str, Any]:
    """Read the source's headers and say what will happen."""
    from .models.checkpoint import Checkpoint

    the_plan = plan_for(Checkpoint.open(run.source), run.recipe, run.device)
    say(the_plan.render())
    return run.write("plan.json", the_plan.to_json())


def convert(run: Run) -> dict[str, Any]:
    """Write the converted model."""
    from .conversion.convert import convert as execute
    from .models.checkpoint import Checkpoint
    from .report.model_card import write_first_card

    if run.converted.exists() and (done := run.read("convert.json")):
        say(f"found {run.converted}")
        return done
    checkpoint = Checkpoint.open(run.source)
    result = execute(
        plan_for(checkpoint, run.recipe, run.device),
        checkpoint,
        run.converted,
        calibration=calibration_for(run.recipe, run.source, run.device),
        max_shard_size=run.recipe.convert.max_shard_size,
        overwrite=True,
    )
    result["source"] |= run.recipe.source.model_dump(include={"model", "base_model", "revision"}) | checkpoint.origin
    write_first_card(run.converted, result, run.source)
    return run.write("convert.json", result)


def uptrain(run: Run) -> dict[str, Any]:
    """Train the converted model on the token budget, and the source model too where a control is asked for."""
    if not run.recipe.train.tokens:
        say("train.tokens is 0: nothing to train")
        return {}
    result = _train(run, run.converted, run.folder)
    if run.recipe.train.needs_control:
        say("control: the source model on the same tokens with the same loss")
        _train(run, run.source, run.control)
    elif run.recipe.train.control:
        say("control: distilling the source model from itself starts at its goal, so the control is the source")
    return result


def _train(run: Run, student: Path, folder: Path) -> dict[str, Any]:
    """Uptrain `student` into `folder`: uptrained/, checkpoints/, metrics.jsonl, train.json."""
    from .training.loop import uptrain as train
    from .training.state import finish

    out, summary = folder / "uptrained", folder / "train.json"
    keep = run.recipe.train.keep_checkpoints_after_success
    if out.exists() and (done := read_json(summary)):
        say(f"found {out}")
        finish(folder, keep=keep)  # in case the end of it was interrupted
        return done
    summary.unlink(missing_ok=True)  # of a model that was removed since
    result = train(
        student,
        run.teacher,
        out,
        run.recipe,
        run_dir=folder,
        device=run.device,
        resume_command=command_line(),
        allow_changes=run.allow_changes,
    )
    write_json(summary, result)
    finish(folder, keep=keep)
    return result


def evaluate(run: Run) -> dict[str, Any]:
    """Measure the same things on the source, the converted and the uptrained model, and compare."""
    from .evaluation.comparison import write_comparison
    from .evaluation.points import Bench, evaluate_points
    from .models.source import cache_folder

    out, cache = run.folder / "eval", cache_folder() / "eval"
    results = evaluate_points(run.points, run.recipe.eval, Bench(out, run.device, run.recipe.seed, texts(run), cache))
    for point, model in run.points.items():
        measure(run, point, model)
    write_comparison(run.folder, margin=run.recipe.eval.margin, seed=run.recipe.seed)
    return results


def texts(run: Run) -> Any:
    """What is measured on plain text, the same at every point."""
    import torch

    from .evaluation.texts import Texts
    from .training.data import held_out_rows

    rows = torch.from_numpy(held_out_rows(text(run), run.recipe.train))
    shared = run.recipe.eval.agreement_tokens
    part = rows[: max(1, shared // rows.shape[1])] if shared else None
    return Texts(run.recipe.eval.perplexity, rows, part, run.source)


def measure(run: Run, point: str, model: Path) -> None:
    """The KV cache of a real `generate`."""
    from .evaluation.cache import measure_kv_cache

    if not run.read(f"eval/{point}/kv_cache.json"):
        run.write(f"eval/{point}/kv_cache.json", measure_kv_cache(model, device=run.device))


def report(run: Run) -> dict[str, Any]:
    """Write report.json, report.md, report.html and the model cards."""
    from .report.model_card import source_card, write_model_card
    from .report.report import build_report

    result = build_report(run.folder)
    for point, folder in (("converted", run.converted), ("after", run.uptrained)):
        if folder.exists():
            write_model_card(folder, result, source_card(run.source), point)
    say(f"report: {run.folder / 'report.html'}")
    return result


def text(run: Run) -> Any:
    """The token store of the run's data (tokenised once, then cached)."""
    from .models.export import load_tokenizer
    from .training.data import store_for

    return store_for(run.recipe, load_tokenizer(run.source), run.source, run.device)


def plan_for(checkpoint: Any, recipe: Recipe, device: str) -> Any:
    """The conversion plan of a recipe; `sharing: auto` measures first, on `device`."""
    from .conversion.auto import choose
    from .conversion.plan import make_plan
    from .models.shape import shape_of
    from .models.source import cache_folder

    sharing, choice = recipe.convert.sharing, None
    if sharing == "auto":
        budget = DEFAULT_BUDGET if recipe.convert.kv_budget is None else recipe.convert.kv_budget
        calibration = calibration_for(recipe, checkpoint.folder, device)
        choice = choose(checkpoint, shape_of(checkpoint.config).kinds, budget, calibration, cache_folder() / "damage")
        sharing = choice.kv_source_layers
    return make_plan(
        checkpoint,
        sharing=sharing,
        init=recipe.convert.init,
        dtype=recipe.source.dtype,
        calibration_tokens=min(recipe.convert.calibration.tokens, CPU_CALIBRATION if device == "cpu" else 10**12),
        choice=choice,
    )


def calibration_for(recipe: Recipe, source: Path, device: str) -> Any:
    """Text for calibrated pooling; None for the other initialisations."""
    if recipe.convert.init != "calibrated":
        return None
    import torch

    from .conversion.convert import Calibration
    from .models.export import load_tokenizer
    from .training.data import calibration_rows, store_for

    store = store_for(recipe, load_tokenizer(source), source, device)
    rows = torch.from_numpy(calibration_rows(store, recipe))
    if device == "cpu" and rows.numel() > CPU_CALIBRATION:
        rows = rows[: max(1, CPU_CALIBRATION // rows.shape[1])]
        say(f"calibrating on {rows.numel()} tokens: more would take a CPU too long")
    return Calibration(rows, store.digest, device, recipe.seed, recipe.convert.calibration.steps)


def _disk_needed(run: Run) -> int:
    """Bytes still to be written: converted, uptrained, and checkpoints (float32 weights and two Adam moments)."""
    from .models.checkpoint import Checkpoint

    tensors = Checkpoint.open(run.source).tensors.values()
    size, parameters = sum(info.nbytes for info in tensors), sum(info.numel for info in tensors)
    needed = 0 if run.converted.exists() else size
    trained = [run.folder] if run.recipe.train.tokens else []
    trained += [run.control] if run.recipe.train.needs_control else []
    for folder in trained:
        if (folder / "uptrained").exists():
            continue
        kept = sum(file.stat().st_size for file in folder.glob("checkpoints/*/*"))
        needed += size + max(12 * parameters * (run.recipe.train.keep_checkpoints + 1) - kept, 12 * parameters)
    return needed


def _clear(folder: Path) -> None:
    """Remove what a run writes, by name, and nothing else."""
    import shutil

    for name in ("converted", "uptrained", "checkpoints", "control", "eval", "tensorboard", "wandb"):
        shutil.rmtree(folder / name, ignore_errors=True)
    results = ["recipe.yaml", "metrics.jsonl", "wandb.id", "report.md", "report.html"]
    results += [f"{name}.png" for name in ("loss", "sharing", "pareto", "bench")]
    results += [f"{name}.json" for name in ("plan", "convert", "train", "environment", "report", "bench")]
    for name in results:
        (folder / name).unlink(missing_ok=True)
