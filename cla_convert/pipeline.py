"""`cla-convert run`: recipe -> plan -> convert -> uptrain -> evaluate -> report, over one run folder.

Every stage leaves its result in the run folder by rename and is skipped when that result is there, so the same command
line resumes after any interruption. This file holds the order of things; each stage lives in its own package.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from .console import human_count, say
from .environment import cache_folder, command_line
from .files import alone_in, read_json, write_json
from .preflight import (
    check_evaluation,
    check_lengths,
    check_tokenizer,
    fitting_calibration,
    positions_of,
)
from .recipe import Recipe
from .recipe_file import Resolved
from .run import Run, clear

STAGES = ["plan", "convert", "uptrain", "eval", "report"]
DEFAULT_BUDGET = 0.5
"""Of `sharing: auto`."""


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
            clear(out)  # only now: a run that cannot start must not cost the one before it
        run.save_recipe()
        result: dict[str, Any] = {}
        for number, (name, stage) in enumerate(stages.items(), 1):
            say(f"\n[{number}/{len(stages)}] {name}")
            with run.timed(name):
                result = stage(run)
            if name == until:
                break
        return result


def check_before_work(run: Run) -> None:
    """Find out now what would otherwise fail after hours: this transformers, tasks, text, tokenizer, lengths, disk."""
    from .evaluation.backend import check_backend
    from .evaluation.harness import check_tasks
    from .evaluation.texts import check_texts
    from .models.checkpoint import Checkpoint
    from .models.export import load_tokenizer
    from .models.self_test import check_interface
    from .models.writer import check_disk
    from .training.data import check_data
    from .training.parameters import check_optimizer
    from .training.teacher import check_teacher
    from .training.trackers import check_trackers

    check_interface(Checkpoint.open(run.source).config.get("model_type", ""))
    check_backend(run.recipe.eval, run.device)
    check_tasks(run.recipe.eval, run.source, run.recipe.seed)
    check_texts(run.recipe.eval.perplexity)
    check_evaluation(run.source, run.recipe.eval.perplexity)
    check_lengths(run.recipe, Checkpoint.open(run.source).config)
    if run.recipe.train.tokens:
        check_trackers(run.recipe.train.log_to)
        check_optimizer(run.recipe.train)
        check_teacher(run.recipe.train, run.source, run.teacher)
    check_data(run.recipe, load_tokenizer(run.source), run.source, run.device)
    check_disk(run.folder, _disk_needed(run))


def plan(run: Run) -> dict[str, Any]:
    """Read the source's headers and say what will happen."""
    from .models.checkpoint import Checkpoint

    the_plan = plan_for(Checkpoint.open(run.source), run.recipe, run.device)
    say(the_plan.render())
    check_memory(run, the_plan)
    return run.write("plan.json", the_plan.to_json())


def check_memory(run: Run, the_plan: Any) -> None:
    """Say what training will need. Raises InputError, with what does fit, if the device has less."""
    from .models.checkpoint import Checkpoint
    from .models.export import cla_config
    from .training.sizing import forecast

    train, source = run.recipe.train, Checkpoint.open(run.source).config
    if not train.tokens:
        return
    converted = cla_config(source, the_plan.family, the_plan.kv_source_layers, the_plan.dtype)
    models = {run.folder: converted, **({run.control: source} if train.needs_control else {})}
    for folder, config in models.items():
        if not (folder / "uptrained").exists():  # else it was trained, perhaps on another machine
            foreseen, rows = forecast(train, config, Checkpoint.open(run.teacher).config, run.device)
            say(f"training    {foreseen.describe(rows)}")


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
    from .evaluation.verdict import Margins

    out, cache = run.folder / "eval", cache_folder() / "eval"
    results = evaluate_points(run.points, run.recipe.eval, Bench(out, run.device, run.recipe.seed, texts(run), cache))
    for point, model in run.points.items():
        measure(run, point, model)
    write_comparison(run.folder, margins=Margins.of(run.recipe.eval), seed=run.recipe.seed)
    return results


def texts(run: Run) -> Any:
    """What is measured on plain text, the same at every point."""
    import torch

    from .evaluation.answers import unseen
    from .evaluation.texts import Texts
    from .models.checkpoint import Checkpoint
    from .models.export import load_tokenizer
    from .training.data import held_out_rows

    store, settings = text(run), run.recipe.eval
    longest = positions_of(Checkpoint.open(run.source).config)
    rows = torch.from_numpy(held_out_rows(store, run.recipe.train))[:, :longest]
    shared = settings.agreement_tokens
    part = rows[: max(1, shared // rows.shape[1])] if shared else None
    prompts = unseen(settings.prompts, load_tokenizer(run.source), store.train) if settings.prompts else []
    domains = _domains(run, store)
    return Texts(settings.perplexity, rows, part, run.source, domains, prompts, settings.answer_tokens)


def _domains(run: Run, store: Any) -> dict[str, Any]:
    """Rows of the domain pack. Writes eval/domains.json: which of them the run's text touched."""
    from .evaluation.domains.overlap import overlap
    from .evaluation.domains.pack import domain_rows
    from .models.checkpoint import Checkpoint
    from .models.export import load_tokenizer

    tokenizer, positions = load_tokenizer(run.source), Checkpoint.open(run.source).positions

    def rows_of(tokens: Any) -> dict[str, Any]:
        return domain_rows(tokenizer, tokens, run.device, first=store.first, positions=positions)

    rows = rows_of(run.recipe.eval.domain_tokens)
    if rows and run.read("eval/domains.json").get("text") != store.digest:
        whole = rows_of(10**9)  # what is judged by its text alone costs little
        found = overlap(store.train, store.held_out, {name: part.numpy() for name, part in whole.items()})
        run.write("eval/domains.json", {"text": store.digest, "domains": found})
    return rows


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
    from .conversion.supported import check_convertible
    from .models.export import load_tokenizer
    from .models.self_test import check_interface
    from .models.shape import shape_of
    from .training.data import calibration_tokens

    check_interface(checkpoint.config.get("model_type", ""))
    if recipe.convert.init == "calibrated":
        check_convertible(checkpoint)  # first of all: it has more to say than a tokenizer that is not there
        check_tokenizer(load_tokenizer(checkpoint.folder), checkpoint.config)
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
        calibration_tokens=calibration_tokens(recipe, checkpoint.folder, device),
        choice=choice,
    )


def calibration_for(recipe: Recipe, source: Path, device: str) -> Any:
    """Text for calibrated pooling; None for the other initialisations."""
    if recipe.convert.init != "calibrated":
        return None
    import torch

    from .conversion.convert import Calibration
    from .models.checkpoint import Checkpoint
    from .models.export import load_tokenizer
    from .training.data import calibration_rows, calibration_tokens, store_for

    store = store_for(recipe, load_tokenizer(source), source, device)
    recipe = fitting_calibration(recipe, Checkpoint.open(source).config)
    rows = torch.from_numpy(calibration_rows(store, recipe, calibration_tokens(recipe, source, device)))
    say(f"calibrating on {human_count(rows.numel())} tokens")
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
