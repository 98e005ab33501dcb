"""Verbs that measure: eval, report."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import data, data_json
from ..errors import InputError
from .app import (
    AllowPickle,
    Gate,
    GateStrict,
    Json,
    Model,
    Recipe,
    Revision,
    Sets,
    TaskData,
    app,
    enforce_gate,
    gate_mode,
    settings_of,
)


@app.command("eval")
def evaluate(
    model: Model,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated task names; default: the offline pack.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task: the first so many.")] = None,
    task_data: TaskData = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results (per task, resumable).")] = None,
    recipe: Recipe = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Score a model with lm-eval.

    Without --tasks: the offline pack that ships with the package. With a network: any stock task by name. Also:
    passkey and needle (retrieval in long contexts), and perplexity of text files (eval.perplexity).
    """
    import tempfile

    from ..environment import pick_device
    from ..evaluation.harness import check_tasks
    from ..evaluation.points import Bench, evaluate_points, shared_work
    from ..evaluation.results import render
    from ..evaluation.texts import Texts, check_texts
    from ..models.source import resolve_source

    options = {"eval.tasks": tasks.split(",") if tasks else None, "eval.limit": limit, "eval.task_data": task_data}
    settings = settings_of(recipe, sets, options)
    check_tasks(settings.eval)
    check_texts(settings.eval.perplexity)
    folder = resolve_source(model, revision=revision, allow_pickle=allow_pickle)
    device = pick_device(settings.device)
    with tempfile.TemporaryDirectory() as scratch:
        texts = Texts(settings.eval.perplexity)
        bench = Bench(out or Path(scratch), device, settings.seed, texts, accelerator=shared_work(device))
        result = evaluate_points({"": folder}, settings.eval, bench)[""]
    if result:  # one process speaks for all
        data_json(result) if as_json else data(render(result))


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    gate: Gate = False,
    gate_strict: GateStrict = False,
    as_json: Json = False,
) -> None:
    """Rebuild the report from the files of a run folder."""
    from ..report.report import build_report

    if not (run_dir / "recipe.yaml").exists():
        raise InputError(
            f"{run_dir} is not a run folder", why="It has no recipe.yaml.", fix="Give --out of `cla-convert run`."
        )
    result = build_report(run_dir)
    data_json(result) if as_json else data(str(run_dir / "report.md"))
    enforce_gate(run_dir, gate_mode(gate, gate_strict))
