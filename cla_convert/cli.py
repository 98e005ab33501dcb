"""The command line. Each verb parses, calls one stage and prints its result; heavy imports happen inside the verbs."""

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import data, data_json, debug, fail, say
from .environment import command_line
from .errors import ClaError, InputError, Interrupted, UsageError

if TYPE_CHECKING:
    from .recipe import Recipe as Schema

app = typer.Typer(
    name="cla-convert",
    help="Give a pretrained MQA/GQA model Cross-Layer Attention: a KV cache half the size, uptrained and proven.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
recipes_app = typer.Typer(help="List, show or copy the recipes that ship with the package.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

Model = Annotated[str, typer.Argument(help="Hub id, local folder or .gguf file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
AllowPickle = Annotated[bool, typer.Option(help="Accept pickled .bin weights (loaded with weights_only=True).")]
Overwrite = Annotated[bool, typer.Option(help="Replace an earlier output.")]
Recipe = Annotated[str | None, typer.Option(help="Recipe file, or the name of a shipped one.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override a value of the recipe; repeatable."),
]


def main() -> None:
    """Entry point: run the app and turn errors into what / why / how to fix and an exit code."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, _interrupt)
    try:
        app()
    except (ClaError, PermissionError, FileExistsError, NotADirectoryError) as error:
        if debug():
            raise
        error = error if isinstance(error, ClaError) else InputError(f"A path cannot be used: {error}")
        fail(error)
        sys.exit(error.exit_code)


def _interrupt(number: int, frame: object) -> None:
    """Stop at once; whatever is published is whole. Uptraining replaces this handler by one that saves first."""
    raise Interrupted("Interrupted", fix=f"Nothing half-done is left behind. To resume: {command_line()}")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Handle the options that come before a verb."""
    if version:
        from . import __version__

        data(f"cla-convert {__version__}")
        raise typer.Exit


@app.command()
def inspect(model: Model, revision: Revision = None, as_json: Json = False) -> None:
    """Say what a model is and what each sharing pattern would save."""
    from .conversion.inspect import inspect_model, render

    result = inspect_model(model, revision=revision)
    data_json(result) if as_json else data(render(result))


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder for the converted model.", show_default=False)],
    sharing: Annotated[
        str | None, typer.Option(help="Pattern or list of groups (docs/sharing.md); default: cla2-keep-ends.")
    ] = None,
    init: Annotated[str | None, typer.Option(help="calibrated (the default), mean or first.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the output: auto, float32, bfloat16, float16.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest shard to write, such as 5GB.")] = None,
    recipe: Recipe = None,
    sets: Sets = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Share K/V projections between layers and write the model.

    The output loads with plain transformers and trust_remote_code=True.
    """
    from .conversion.convert import convert as execute
    from .environment import pick_device
    from .models.checkpoint import Checkpoint
    from .models.source import resolve_source
    from .models.writer import check_output
    from .pipeline import calibration_for, plan_for
    from .report.model_card import source_card, write_model_card

    options = {
        "source.model": model, "source.revision": revision, "source.dtype": dtype, "convert.sharing": sharing,
        "convert.init": init, "convert.max_shard_size": max_shard_size, "source.allow_pickle": allow_pickle or None,
    }  # fmt: skip
    settings = _settings(recipe, sets, options)
    source = resolve_source(model, revision=settings.source.revision, allow_pickle=settings.source.allow_pickle)
    checkpoint = Checkpoint.open(source)
    plan = plan_for(checkpoint, settings)
    if dry_run:
        data_json(plan.to_json()) if as_json else data(plan.render())
        return
    say(plan.render())
    check_output(out, overwrite=overwrite)  # before the minutes that calibration may take
    calibration = calibration_for(settings, source, pick_device(settings.device))
    shard_size = settings.convert.max_shard_size
    result = execute(plan, checkpoint, out, calibration=calibration, max_shard_size=shard_size, overwrite=overwrite)
    result["source"] |= settings.source.model_dump(include={"model", "base_model", "revision"}) | checkpoint.origin
    write_model_card(
        out,
        {
            "converted": result,
            "source": result["source"],
            "kv": {f"bytes_per_token_{k}": v for k, v in result["kv_bytes_per_token"].items()},
        },
        source_card(source),
    )
    if as_json:
        data_json(result)
    else:
        data(str(out))
        say(f"done in {result['seconds']:.1f} s. It has lost quality until it is uptrained: cla-convert uptrain --help")


def _settings(recipe: str | None, sets: list[str] | None, options: dict[str, Any]) -> "Schema":
    """A recipe (or the defaults), then --set, then the options of the verb that were given."""
    from .recipe import load_recipe
    from .recipes import find_recipe

    given = [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
    return load_recipe(find_recipe(recipe) if recipe else None, [*(sets or []), *given]).recipe


@app.command()
def uptrain(
    model: Annotated[Path, typer.Argument(help="Folder of a converted model.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder for the uptrained model.", show_default=False)],
    recipe: Annotated[str | None, typer.Option(help="Recipe file, or the name of a shipped one.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token budget, such as 26M.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Source model; default: the recipe's.")] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue from the last checkpoint (the default if there is one).")
    ] = True,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Recover a converted model's quality on a token budget.

    Interrupted? The same command line resumes.
    """
    from .environment import pick_device
    from .files import write_json
    from .models.source import resolve_source
    from .recipe import load_recipe
    from .recipes import find_recipe
    from .training.loop import uptrain as train

    overrides = [*(sets or []), *([f"train.tokens={tokens}"] if tokens else [])]
    resolved = load_recipe(find_recipe(recipe) if recipe else None, overrides)
    settings = resolved.recipe
    if not settings.train.tokens:
        raise UsageError("No token budget", fix="Give --tokens, for example --tokens 26M.")
    if not (source := teacher or settings.source.model):
        raise UsageError("No teacher", why="Distillation needs the source model.", fix="Give --teacher MODEL.")
    if out.exists():
        raise InputError(f"{out} exists", fix="Give another folder, or remove it to train again.")
    say(resolved.table())
    state = out.with_name(f"{out.name}.state")
    state.mkdir(parents=True, exist_ok=True)
    result = train(
        model,
        resolve_source(source, revision=settings.source.revision, allow_pickle=settings.source.allow_pickle),
        out,
        settings,
        run_dir=state,
        device=pick_device(settings.device),
        resume_command=command_line(),
        fresh=not resume,
    )
    write_json(state / "train.json", result)
    data_json(result) if as_json else data(str(out))


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

    from .environment import pick_device
    from .evaluation.harness import check_tasks, render
    from .evaluation.harness import evaluate as score
    from .models.source import resolve_source
    from .recipe import load_recipe

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
    from .report.report import build_report

    if not (run_dir / "recipe.yaml").exists():
        raise InputError(
            f"{run_dir} is not a run folder", why="It has no recipe.yaml.", fix="Give --out of `cla-convert run`."
        )
    result = build_report(run_dir)
    data_json(result) if as_json else data(str(run_dir / "report.md"))


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(help="Recipe file, or the name of a shipped one (demo).", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Run folder; rerunning the same line resumes.", show_default=False)],
    sets: Sets = None,
    until: Annotated[
        str, typer.Option(help="Stop after this stage: plan, convert, uptrain, eval or report.")
    ] = "report",
    overwrite: Annotated[bool, typer.Option(help="Start the run folder anew.")] = False,
    as_json: Json = False,
) -> None:
    """Do it all: plan, convert, uptrain, evaluate, report.

    Rerunning the same line resumes where it stopped.
    """
    from .errors import did_you_mean
    from .recipe import load_recipe
    from .recipes import find_recipe

    resolved = load_recipe(find_recipe(recipe), sets or [])
    from . import pipeline

    if until not in pipeline.STAGES:
        raise UsageError(
            f"There is no stage {until!r}.{did_you_mean(until, pipeline.STAGES)}", fix=", ".join(pipeline.STAGES)
        )
    result = pipeline.run(resolved, out, until=until, overwrite=overwrite)
    if as_json:
        data_json(result)
    elif until == "report":
        data((out / "report.md").read_text(encoding="utf-8"))


@app.command()
def verify(
    model: Annotated[Path, typer.Argument(help="Output folder.", show_default=False)], as_json: Json = False
) -> None:
    """Check that an output loads and works without cla-convert.

    It is loaded in a clean process, from another folder, offline: weights, logits with and without cache, the size of
    the cache, tokenizer, generation.
    """
    from .models.verify import render, verify_model

    result = verify_model(model)
    data_json(result) if as_json else data(render(result))


@app.command()
def env(as_json: Json = False) -> None:
    """Print versions and hardware, for bug reports."""
    from .environment import hardware, versions

    result = {"versions": versions(), "hardware": hardware()}
    if as_json:
        data_json(result)
    else:
        data("\n".join(f"{name:<14}{value}" for part in result.values() for name, value in part.items()))


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the shipped recipes."""
    from .recipes import list_recipes

    data("\n".join(f"{name:<16}{title}" for name, title in list_recipes().items()))


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="Name of a shipped recipe.", show_default=False)]) -> None:
    """Print a shipped recipe."""
    from .recipes import find_recipe

    data(find_recipe(name).read_text(encoding="utf-8").rstrip())


@recipes_app.command("reference")
def recipes_reference() -> None:
    """Print every setting of a recipe, as Markdown."""
    from .recipes import reference

    data(reference().rstrip())


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.", show_default=False)],
    to: Annotated[Path, typer.Argument(help="File or folder.", show_default=False)] = Path(),
) -> None:
    """Copy a shipped recipe, to edit it."""
    import shutil

    from .recipes import find_recipe

    if to.exists() and not to.is_dir():
        raise UsageError(f"{to} exists", fix="Give another name.")
    data(str(shutil.copy(find_recipe(name), to)))


if __name__ == "__main__":
    main()
