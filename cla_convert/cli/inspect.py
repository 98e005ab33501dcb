"""inspect: what a model is, and what sharing would save."""

from ..console import data, data_json, say
from ..environment import import_slowly
from .app import Json, Model, Quiet, Revision, app


@app.command(epilog="Example: cla-convert inspect Qwen/Qwen3-0.6B")
def inspect(model: Model, revision: Revision = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Say what a model is and what each sharing pattern would save."""
    say(f"reading {model} ...")
    import_slowly("torch", "transformers")
    from ..conversion.inspect import inspect_model, render

    result = inspect_model(model, revision=revision)
    data_json(result) if as_json else data(render(result))
