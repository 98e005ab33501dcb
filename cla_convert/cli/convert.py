"""convert: a model that shares keys and values between layers."""

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ..console import command, data, data_json, page, say
from ..conversion.initialisation import INITIALISATIONS
from ..conversion.pattern import PATTERNS
from .app import (
    AllowPickle,
    Json,
    Model,
    Overwrite,
    Private,
    PushToHub,
    Quiet,
    Recipe,
    Revision,
    Sets,
    app,
    destination,
    push,
    settings_of,
)
from .words import number

_CORPUS = "data.sources=[{path: my-corpus/}]"


@app.command(epilog="Example: cla-convert convert Qwen/Qwen3-0.6B out/ --sharing cla2-keep-ends")
def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the converted model.", show_default=False)],
    sharing: Annotated[
        str | None,
        typer.Option(
            metavar="MAP", help=f"{', '.join(PATTERNS.names())}, a list of groups, or auto; default: cla2-keep-ends."
        ),
    ] = None,
    kv_budget: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            parser=number("--kv-budget", 0, 0.5),
            help="With --sharing auto: share of the KV cache to keep (0.5).",
        ),
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(metavar="N", help="Pool the KV heads of a layer into N (GQA); default: as they are.")
    ] = None,
    init: Annotated[
        str | None, typer.Option(metavar="INIT", help=f"{', '.join(INITIALISATIONS.names())}; default: calibrated.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="Dtype of the output: auto, float32, bfloat16, float16.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest shard to write, such as 5GB.")
    ] = None,
    recipe: Recipe = None,
    sets: Sets = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Of a model that also sees images, convert the language model alone.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Share K/V projections between layers and write the model.

    The output loads with plain transformers and trust_remote_code=True.
    """
    from ..models.source import local_path
    from ..models.writer import check_output

    options = {
        "source.model": model, "source.revision": revision, "source.dtype": dtype, "convert.sharing": sharing,
        "convert.kv_budget": kv_budget, "convert.kv_heads": kv_heads,
        "convert.init": init, "convert.max_shard_size": max_shard_size, "source.allow_pickle": allow_pickle or None,
        "source.text_only": text_only or None,
    }  # fmt: skip
    settings = settings_of(recipe, sets, options)
    if settings.data.sampled:  # no hours of sampling for a training that is not here
        settings = settings.model_copy(update={"train": settings.train.model_copy(update={"tokens": 0})})
    if not dry_run:
        local_path(model)
        check_output(out, overwrite=overwrite)
    say(f"reading {model} ...")
    from ..run_folder import RunFolder, alone_around
    from ..stages.convert import convert as execute
    from ..stages.plan import plan_of, preview, shown

    hub = destination(push_to_hub, private)
    with (
        tempfile.TemporaryDirectory() as scratch,  # a single model keeps no records
        nullcontext() if dry_run else alone_around(out),
    ):
        folder = RunFolder(Path(scratch), converted=out)
        if dry_run:
            plan = preview(settings, folder)
            data_json(plan.to_json()) if as_json else page(shown(settings, plan))
            return
        plan = plan_of(settings, folder)
        say(shown(settings, plan))
        result = execute(settings, folder, overwrite=overwrite, the_plan=plan).to_json()
    say(f"done in {result['seconds']:.1f} s. It has lost quality until it is uptrained, on text as broad as its use:")
    say(f"next        {command('uptrain', out, 'trained/', '--tokens', '26M', '--set', _CORPUS)}")
    try:
        result |= push(hub, out)
    finally:
        data_json(result) if as_json else data(str(out))
