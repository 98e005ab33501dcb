"""inspect: what a model is, what sharing would save, and what training would take."""

import sys
from typing import Annotated

import typer

from ..console import columns, data_json, page, say
from ..environment import import_slowly
from ..errors import UsageError
from .app import AllowPickle, Json, Model, Quiet, Recipe, Revision, Sets, app, settings_of
from .words import numbers_of


@app.command(epilog="Example: cla-convert inspect Qwen/Qwen3-8B --training")
def inspect(
    model: Model,
    training: Annotated[
        bool, typer.Option("--training", help="Also the memory that training takes on so many GPUs.")
    ] = False,
    gpus: Annotated[
        str | None, typer.Option(metavar="A,B", help="With --training: numbers of GPUs; default: 1,2,8,16,64.")
    ] = None,
    recipe: Recipe = None,
    sets: Sets = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a model is and what each sharing pattern would save."""
    if not training and (gpus or recipe or sets):
        raise UsageError("--gpus, --recipe and --set say how to train", fix="Give --training, too.")
    say(f"reading {model} ...")
    import_slowly("torch", "transformers")
    from ..conversion.inspect import inspect_model, render

    result = inspect_model(model, revision=revision, allow_pickle=allow_pickle)
    more = ""
    if training:
        from ..conversion.capacity import GPUS, capacity_of

        settings = settings_of(recipe, sets, {"source.allow_pickle": allow_pickle or None})
        numbers = numbers_of(gpus, "--gpus") if gpus else GPUS
        capacity = capacity_of(model, settings, revision=revision, gpus=numbers)
        result, more = result | {"training": capacity.to_json()}, capacity.render()
    data_json(result) if as_json else page(render(result, more, columns(sys.stdout)))
