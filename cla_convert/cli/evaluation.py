"""Verbs that measure: eval, report."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import data, data_json
from ..errors import InputError
from .app import AllowPickle, Json, Model, Revision, Sets, app


@app.command("eval")
def evaluate(
    model: Model,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated task names; default: the offline pack.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results (per task, resumable).")] = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Score a model with lm-eval.

    Without --tasks: the offline pack that ships with the package. With a network: any stock task by name.
    """
    import tempfile

    from ..environment import pick_device
    from ..evaluation.harness import check_tasks, render
    from ..evaluation.harness import evaluate as score
    from ..models.source import resolve_source
    from ..recipe import load_recipe

    overrides = list(sets or [])
    overrides += [f"eval.tasks=[{tasks}]"] if tasks else []
    overrides += [f"eval.limit={limit}"] if limit is not None else []
    settings = load_recipe(None, overrides).recipe
    check_tasks(settings.eval)
    folder = resolve_source(model, revision=revision, allow_pickle=allow_pickle)
    with tempfile.TemporaryDirectory() as scratch:
        result = score(
            folder, settings.eval, out or Path(scratch), device=pick_device(settings.device), seed=settings.seed
        )
    data_json(result) if as_json else data(render(result))


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)], as_json: Json = False
) -> None:
    """Rebuild the report from the files of a run folder."""
    from ..report.report import build_report

    if not (run_dir / "recipe.yaml").exists():
        raise InputError(
            f"{run_dir} is not a run folder", why="It has no recipe.yaml.", fix="Give --out of `cla-convert run`."
        )
    result = build_report(run_dir)
    data_json(result) if as_json else data(str(run_dir / "report.md"))
