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
from .files import read_json, write_json
from .recipe import Recipe, Resolved
from .same_recipe import check_same_recipe

STAGES = ["plan", "convert", "uptrain", "eval", "report"]


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
    device: str
    allow_changes: Collection[str] = ()

    @classmethod
    def start(cls, resolved: Resolved, folder: Path, *, overwrite: bool, allow_changes: Collection[str] = ()) -> "Run":
        """Open or create the run folder, save the resolved recipe, find the source model."""
        from .models.source import resolve_source

        recipe = resolved.recipe
        check_same_recipe(folder, recipe, overwrite, allow_changes)
        device = pick_device(recipe.device)
        source = resolve_source(
            recipe.source.model, revision=recipe.source.revision, allow_pickle=recipe.source.allow_pickle
        )
        return cls(folder, recipe, source, device, allow_changes)

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
    def points(self) -> dict[str, Path]:
        """The models to evaluate."""
        points = {"before": self.source, "converted": self.converted, "after": self.uptrained}
        return points if self.recipe.train.tokens else {name: points[name] for name in ("before", "converted")}

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
    from .evaluation.harness import check_tasks
    from .models.export import load_tokenizer
    from .models.writer import check_disk

    check_tasks(run.recipe.eval)
    load_tokenizer(run.source)
    text(run)
    check_disk(run.folder, _disk_needed(run))


def plan(run: Run) -> dict[str, Any]:
    """Read the source's headers and say what will happen."""
    from .models.checkpoint import Checkpoint

    the_plan = plan_for(Checkpoint.open(run.source), run.recipe)
    say(the_plan.render())
    return run.write("plan.json", the_plan.to_json())


def convert(run: Run) -> dict[str, Any]:
    """Write the converted model."""
    from .conversion.convert import convert as execute
    from .models.checkpoint import Checkpoint

    if run.converted.exists() and (done := run.read("convert.json")):
        say(f"found {run.converted}")
        return done
    checkpoint = Checkpoint.open(run.source)
    result = execute(
        plan_for(checkpoint, run.recipe),
        checkpoint,
        run.converted,
        calibration=calibration_for(run.recipe, run.source, run.device),
        max_shard_size=run.recipe.convert.max_shard_size,
        overwrite=True,
    )
    result["source"] |= run.recipe.source.model_dump(include={"model", "base_model", "revision"}) | checkpoint.origin
    return run.write("convert.json", result)


def uptrain(run: Run) -> dict[str, Any]:
    """Train the converted model on the token budget."""
    from .training.loop import uptrain as train
    from .training.state import finish

    if not run.recipe.train.tokens:
        say("train.tokens is 0: nothing to train")
        return {}
    keep = run.recipe.train.keep_checkpoints_after_success
    if run.uptrained.exists() and (done := run.read("train.json")):
        say(f"found {run.uptrained}")
        finish(run.folder, keep=keep)  # in case the end of it was interrupted
        return done
    (run.folder / "train.json").unlink(missing_ok=True)  # of a model that was removed since
    result = train(
        run.converted,
        run.source,
        run.uptrained,
        run.recipe,
        run_dir=run.folder,
        device=run.device,
        resume_command=command_line(),
        allow_changes=run.allow_changes,
    )
    run.write("train.json", result)
    finish(run.folder, keep=keep)
    return result


def evaluate(run: Run) -> dict[str, Any]:
    """Measure the same things on the source, the converted and the uptrained model."""
    from .evaluation.harness import evaluate as evaluate_tasks
    from .models.source import cache_folder

    results = {}
    for point, model in run.points.items():
        say(f"{point}: {model}")
        results[point] = evaluate_tasks(
            model,
            run.recipe.eval,
            run.folder / "eval" / point,
            device=run.device,
            seed=run.recipe.seed,
            cache_dir=cache_folder() / "eval" if point == "before" else None,
            label=point,
        )
        measure(run, point, model)
    return results


def measure(run: Run, point: str, model: Path) -> None:
    """Held-out perplexity and the KV cache of a real `generate`."""
    import torch

    from .evaluation.cache import measure_kv_cache
    from .evaluation.model import choose_dtype
    from .evaluation.perplexity import token_perplexity
    from .models.export import load_model
    from .training.data import held_out_rows

    if not run.read(f"eval/{point}/held_out.json"):
        rows = torch.from_numpy(held_out_rows(text(run), run.recipe.train))
        loaded = load_model(model, dtype=choose_dtype("auto", run.device), device=run.device)
        run.write(f"eval/{point}/held_out.json", token_perplexity(loaded, rows))
    if not run.read(f"eval/{point}/kv_cache.json"):
        run.write(f"eval/{point}/kv_cache.json", measure_kv_cache(model, device=run.device))


def report(run: Run) -> dict[str, Any]:
    """Write report.json, report.md and the model cards."""
    from .report.model_card import source_card, write_model_card
    from .report.report import build_report

    result = build_report(run.folder)
    for folder in (run.converted, run.uptrained):
        if folder.exists():
            write_model_card(folder, result, source_card(run.source))
    say(f"report: {run.folder / 'report.md'}")
    return result


def text(run: Run) -> Any:
    """The token store of the run's data (tokenised once, then cached)."""
    from .models.export import load_tokenizer
    from .training.data import store_for

    return store_for(run.recipe, load_tokenizer(run.source))


def plan_for(checkpoint: Any, recipe: Recipe) -> Any:
    """The conversion plan of a recipe."""
    from .conversion.plan import make_plan

    return make_plan(
        checkpoint,
        sharing=recipe.convert.sharing,
        init=recipe.convert.init,
        dtype=recipe.source.dtype,
        max_shard_size=recipe.convert.max_shard_size,
        calibration_tokens=recipe.convert.calibration.tokens,
    )


def calibration_for(recipe: Recipe, source: Path, device: str) -> Any:
    """Text for calibrated pooling; None for the other initialisations."""
    if recipe.convert.init != "calibrated":
        return None
    import torch

    from .conversion.convert import Calibration
    from .conversion.matching import Effort
    from .models.export import load_tokenizer
    from .training.data import calibration_rows, store_for

    store = store_for(recipe, load_tokenizer(source))
    rows = torch.from_numpy(calibration_rows(store, recipe))
    limit = Effort.default(device).max_tokens
    if limit is not None and rows.numel() > limit:
        rows = rows[: max(1, limit // rows.shape[1])]
        say(f"calibrating on {rows.numel()} tokens: more would take a CPU too long")
    return Calibration(rows, store.digest, device, recipe.seed)


def _disk_needed(run: Run) -> int:
    """Bytes still to be written: converted, uptrained, and checkpoints (float32 weights and two Adam moments)."""
    from .models.checkpoint import Checkpoint

    tensors = Checkpoint.open(run.source).tensors.values()
    size, parameters = sum(info.nbytes for info in tensors), sum(info.numel for info in tensors)
    needed = 0 if run.converted.exists() else size
    if run.recipe.train.tokens and not run.uptrained.exists():
        kept = sum(file.stat().st_size for file in run.folder.glob("checkpoints/*/*"))
        needed += size + max(12 * parameters * (run.recipe.train.keep_checkpoints + 1) - kept, 12 * parameters)
    return needed


def _clear(folder: Path) -> None:
    """Remove what a run writes, by name, and nothing else."""
    import shutil

    for name in ("converted", "uptrained", "checkpoints", "eval"):
        shutil.rmtree(folder / name, ignore_errors=True)
    results = ["recipe.yaml", "metrics.jsonl", "report.md", "loss.png", "sharing.png"]
    results += [f"{name}.json" for name in ("plan", "convert", "train", "environment", "report")]
    for name in results:
        (folder / name).unlink(missing_ok=True)
