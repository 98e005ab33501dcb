"""Verbs about a model folder: inspect, convert, verify, chat."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import data, data_json, say
from ..conversion.initialisation import INITIALISATIONS
from ..conversion.pattern import PATTERNS
from ..errors import UsageError
from .app import (
    AllowPickle,
    Json,
    Model,
    Overwrite,
    Private,
    PushToHub,
    Recipe,
    Revision,
    Sets,
    app,
    destination,
    push,
    settings_of,
)


@app.command()
def inspect(model: Model, revision: Revision = None, as_json: Json = False) -> None:
    """Say what a model is and what each sharing pattern would save."""
    from ..conversion.inspect import inspect_model, render

    result = inspect_model(model, revision=revision)
    data_json(result) if as_json else data(render(result))


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder for the converted model.", show_default=False)],
    sharing: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(PATTERNS.names())}, a list of groups or auto; default: cla2-keep-ends."),
    ] = None,
    kv_budget: Annotated[
        float | None, typer.Option(help="With --sharing auto: share of the KV cache to keep (0.5).")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help=f"{', '.join(INITIALISATIONS.names())}; default: calibrated.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the output: auto, float32, bfloat16, float16.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest shard to write, such as 5GB.")] = None,
    recipe: Recipe = None,
    sets: Sets = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Share K/V projections between layers and write the model.

    The output loads with plain transformers and trust_remote_code=True.
    """
    from ..conversion.convert import convert as execute
    from ..environment import pick_device
    from ..models.checkpoint import Checkpoint
    from ..models.source import resolve_source
    from ..models.writer import check_output
    from ..pipeline import calibration_for, plan_for
    from ..report.model_card import write_first_card

    options = {
        "source.model": model, "source.revision": revision, "source.dtype": dtype, "convert.sharing": sharing,
        "convert.kv_budget": kv_budget,
        "convert.init": init, "convert.max_shard_size": max_shard_size, "source.allow_pickle": allow_pickle or None,
    }  # fmt: skip
    settings = settings_of(recipe, sets, options)
    hub = destination(push_to_hub, private)
    source = resolve_source(
        model, revision=settings.source.revision, allow_pickle=settings.source.allow_pickle, to_convert=True
    )
    checkpoint = Checkpoint.open(source)
    plan = plan_for(checkpoint, settings, pick_device(settings.device))
    if dry_run:
        data_json(plan.to_json()) if as_json else data(plan.render())
        return
    say(plan.render())
    check_output(out, overwrite=overwrite)  # before the minutes that calibration may take
    calibration = calibration_for(settings, source, pick_device(settings.device))
    shard_size = settings.convert.max_shard_size
    result = execute(plan, checkpoint, out, calibration=calibration, max_shard_size=shard_size, overwrite=overwrite)
    result["source"] |= settings.source.model_dump(include={"model", "base_model", "revision"}) | checkpoint.origin
    write_first_card(out, result, source)
    say(f"done in {result['seconds']:.1f} s. It has lost quality until it is uptrained: cla-convert uptrain --help")
    try:
        result |= push(hub, out)
    finally:
        data_json(result) if as_json else data(str(out))


@app.command()
def verify(
    model: Annotated[Path, typer.Argument(help="Output folder.", show_default=False)],
    update_code: Annotated[
        bool, typer.Option("--update-code", help="First replace its modelling files by this version's.")
    ] = False,
    cache: Annotated[bool, typer.Option("--cache", help="Measure the KV cache, too, and what sharing saves.")] = False,
    beside: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="With --cache: measure this model, too, and compare.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that an output loads and works without cla-convert.

    It is loaded in a clean process, from another folder, offline: weights, logits with and without cache, the size of
    the cache, tokenizer, generation.
    """
    from ..models.export import update_code as update
    from ..models.source import resolve_source
    from ..models.verify import measure_cache, render, render_cache, verify_model

    if beside and not cache:
        raise UsageError("--beside compares KV caches", fix="Give --cache, too.")
    if update_code:
        update(model)
    result = verify_model(model)
    if cache:
        result["cache"] = measure_cache(model, resolve_source(beside) if beside else None)
    if as_json:
        data_json(result)
    else:
        data("\n".join([render(result), *([render_cache(result["cache"])] if cache else [])]))


@app.command()
def chat(
    model: Model,
    beside: Annotated[str | None, typer.Option(metavar="MODEL", help="Another one that answers, too.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto: the best there is.")] = "auto",
) -> None:
    """Talk to a model, or to two side by side.

    Lines come from the terminal or a pipe. /reset begins a new conversation; Ctrl-D ends.
    """
    import sys

    from ..chat import Manner, Speaker, lines_of
    from ..chat import chat as converse
    from ..environment import choose_dtype, pick_device
    from ..models.source import resolve_source

    device = pick_device(device)
    manner = Manner(max_new_tokens, temperature, system)
    folders = {Path(name).name or name: resolve_source(name) for name in (model, beside) if name}
    if beside and len(folders) == 1:
        folders = {model: resolve_source(model), beside: resolve_source(beside)}
    speakers = [
        Speaker.load(name, folder, device=device, dtype=choose_dtype("auto", device), manner=manner)
        for name, folder in folders.items()
    ]
    converse(speakers, lines_of(sys.stdin))
