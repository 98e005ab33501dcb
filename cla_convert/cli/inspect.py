"""inspect: what a model is, and what sharing would save."""

from ..console import data, data_json
from .app import Json, Model, Revision, app


@app.command()
def inspect(model: Model, revision: Revision = None, as_json: Json = False) -> None:
    """Say what a model is and what each sharing pattern would save."""
    from ..conversion.inspect import inspect_model, render

    result = inspect_model(model, revision=revision)
    data_json(result) if as_json else data(render(result))
