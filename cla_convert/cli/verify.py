"""verify: does an output load and work without cla-convert?"""

from pathlib import Path
from typing import Annotated

import typer

from ..console import data_json, page
from ..errors import UsageError
from .app import AllowPickle, Json, Quiet, app


@app.command(epilog="Example: cla-convert verify out/ --cache")
def verify(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder.", show_default=False)],
    update_code: Annotated[
        bool, typer.Option("--update-code", help="First replace its modelling files by this version's.")
    ] = False,
    cache: Annotated[bool, typer.Option("--cache", help="Measure the KV cache, too, and what sharing saves.")] = False,
    beside: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="With --cache: measure this model, too, and compare.")
    ] = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that an output loads and works without cla-convert.

    It is loaded in a clean process, from another folder, offline: weights, logits with and without cache, the size of
    the cache, tokenizer, generation.
    """
    from ..models.shipped import update_code as update
    from ..models.source import resolve_source
    from ..models.verify import measure_cache, render, render_cache, verify_model

    if beside and not cache:
        raise UsageError("--beside compares KV caches", fix="Give --cache, too.")
    source = resolve_source(beside, allow_pickle=allow_pickle) if beside else None  # refused before work
    if update_code:
        update(model)
    result = verify_model(model)
    if cache:
        result["cache"] = measure_cache(model, source)
    if as_json:
        data_json(result)
    else:
        page("\n".join([render(result), *([render_cache(result["cache"])] if cache else [])]))
