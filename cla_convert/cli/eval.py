"""eval: score one model."""

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import columns, data_json, page, say
from ..files import check_place
from .app import (
    AllowPickle,
    IncludePath,
    Json,
    Model,
    Quiet,
    Recipe,
    Revision,
    Sets,
    TaskData,
    app,
    load,
    settings_of,
)
from .words import names_of, texts_in, whole


@app.command("eval", epilog="Example: cla-convert eval trained/ --tasks piqa,wikitext --limit 100")
def evaluate(
    model: Model,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Comma-separated task names; default: the offline pack.")
    ] = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Text, jsonl or parquet file to measure the perplexity of, alone if no tasks are named; repeatable.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", parser=whole("--limit", 1, 100), help="Documents per task: the first so many."),
    ] = None,
    task_data: TaskData = None,
    include_path: IncludePath = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for results (per task, resumable).")] = None,
    backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="What scores the tasks: hf, or vllm if installed.")
    ] = None,
    recipe: Recipe = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    sets: Sets = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a model with lm-eval, or on texts of one's own.

    Without --tasks: the offline pack that ships with the package. With a network: any stock task by name. Also:
    passkey and needle (retrieval in long contexts), and perplexity of text files.
    """
    from ..environment import import_slowly, pick_device, rank
    from ..evaluation.asked import check_asked
    from ..models.source import check_revision, local_path, resolve_source

    options: dict[str, Any] = {
        "eval.tasks": None if tasks is None else names_of(tasks),
        "eval.limit": limit,
        "eval.task_data": task_data,
        "eval.include_path": include_path,
        "eval.backend": backend,
    }
    if perplexity:
        given = load(recipe, sets, options)  # nobody who names a text alone waits for tasks
        named = given.recipe.eval.tasks if "eval.tasks" in given.origins else []
        options |= {"eval.tasks": named, "eval.perplexity": texts_in(perplexity, ["held_out", *named])}
    settings = settings_of(recipe, sets, options)
    if out:
        check_place(out)
    check_asked(settings.eval)
    local_path(model)
    check_revision(model, revision)
    say("reading tasks and model ...")
    import_slowly("torch", "transformers", "lm_eval")
    device = pick_device(settings.device)
    from ..evaluation.backend import check_backend
    from ..evaluation.harness import check_tasks
    from ..evaluation.points import Conditions, evaluate_points, shared_work
    from ..evaluation.results import render
    from ..evaluation.texts import Texts, check_texts
    from ..models.checkpoint import Checkpoint
    from ..preflight import check_evaluation, fitted
    from ..run_folder import alone_around

    check_backend(settings.eval, device)
    if not settings.eval.chat_template:  # before a model is fetched
        check_tasks(settings.eval)
    check_texts(settings.eval.perplexity)
    folder = resolve_source(model, revision=revision, allow_pickle=allow_pickle)
    if settings.eval.chat_template:  # the model's, which the requests are made with
        check_tasks(settings.eval, folder, settings.seed)
    check_evaluation(folder)
    with (
        tempfile.TemporaryDirectory() as scratch,
        alone_around(out) if out and rank() == 0 else nullcontext(),
    ):
        texts = Texts(fitted(settings.eval.perplexity, Checkpoint.open(folder).config))
        conditions = Conditions(out or Path(scratch), device, settings.seed, texts, accelerator=shared_work(device))
        result = evaluate_points({"": folder}, settings.eval, conditions)[""]
    if result:  # one process speaks for all
        data_json(result) if as_json else page(render(result, columns(sys.stdout)))
