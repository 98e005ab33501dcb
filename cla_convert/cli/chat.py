"""chat: talk to a model, or to two side by side."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..console import say
from ..environment import import_slowly
from ..errors import UsageError
from .app import AllowPickle, Model, Quiet, app
from .words import number, whole


@app.command(epilog="Example: cla-convert chat trained/ --beside Qwen/Qwen3-0.6B")
def chat(
    model: Model,
    beside: Annotated[str | None, typer.Option(metavar="MODEL", help="Another one that answers, too.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", parser=whole("--max-new-tokens", 1, 256), help="Longest answer, in tokens.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(metavar="T", parser=number("--temperature", 0, 0.7), help="0 is greedy.")
    ] = 0.0,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, ...; auto: the best there is.")] = "auto",
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
) -> None:
    """Talk to a model, or to two side by side.

    Lines come from the terminal or a pipe. /reset begins a new conversation; Ctrl-D ends.
    """
    say("starting ...")
    import_slowly("torch", "transformers")
    from ..chat import Manner, Speaker, check_length, lines_of
    from ..chat import chat as converse
    from ..environment import choose_dtype, pick_device
    from ..models.source import resolve_source
    from ..surrogates import replaced

    device = pick_device(device, "--device ")
    manner = Manner(max_new_tokens, temperature, replaced(system, "--system"))
    folders = {name: resolve_source(name, allow_pickle=allow_pickle) for name in (model, beside) if name}
    if beside and len({folder.resolve() for folder in folders.values()}) == 1:
        raise UsageError(f"{model} would answer twice", "--beside names the same model.", "Name another one, or none.")
    for name, folder in folders.items():
        check_length(name, folder, max_new_tokens)
    say(f"loading {' and '.join(folders)} ...")
    short = {Path(name).name or name for name in folders}
    speakers = [
        Speaker.load(
            Path(name).name if len(short) == len(folders) else name, folder,
            device=device, dtype=choose_dtype(device), manner=manner,
        )
        for name, folder in folders.items()
    ]  # fmt: skip
    converse(speakers, lines_of(sys.stdin))
