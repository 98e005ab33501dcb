"""The Typer application, and the options that several verbs have."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import data, hush
from ..environment import world_size
from ..errors import UsageError
from .verbs import Verbs

if TYPE_CHECKING:
    from ..models.upload import Destination
    from ..recipe import Recipe as Schema
    from ..recipe_file import Resolved

app = Verbs(
    name="cla-convert",
    help="Give an MHA, GQA or MQA model Cross-Layer Attention: a KV cache half the size, uptrained and measured.",
    epilog="Begin with: cla-convert inspect MODEL; cla-convert recipes ls. A command's --help has an example.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
recipes_app = Verbs(
    help="List, show or copy the recipes that ship with the package.",
    epilog="Example: cla-convert recipes cp smollm2-135m mine.yaml",
    no_args_is_help=True,
)
app.add_typer(recipes_app, name="recipes")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder or .gguf file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def _hush(quiet: bool) -> None:
    if quiet:
        hush()


Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="No progress and no notes; warnings and errors stay.", callback=_hush)
]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a hub model.")]
AllowPickle = Annotated[bool, typer.Option(help="Accept pickled .bin weights (loaded with weights_only=True).")]
Overwrite = Annotated[bool, typer.Option(help="Replace an earlier output.")]
Recipe = Annotated[str | None, typer.Option(metavar="RECIPE", help="Recipe file, or the name of a shipped one.")]
AllowChanges = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-change",
        metavar="A.B",
        help="Resume although this setting (or section) changed; repeatable. The result records it.",
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override a value of the recipe; repeatable."),
]

PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="REPO", help="Upload the finished model to this repository of the hub."),
]
Private = Annotated[bool, typer.Option("--private", help="With --push-to-hub: a new repository is private.")]
TaskData = Annotated[
    str | None, typer.Option(metavar="DIR", help="Folder of full evaluation sets (docs/evaluation.md).")
]
IncludePath = Annotated[
    str | None, typer.Option(metavar="DIR", help="Folder of one's own lm-eval tasks (YAML), for eval.tasks to name.")
]
Gate = Annotated[bool, typer.Option("--gate", help="Exit with code 4 if a loss beyond a margin is shown.")]
GateStrict = Annotated[
    bool, typer.Option("--gate-strict", help="Exit with code 4 unless the losses are shown to be within their margins.")
]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    quiet: Quiet = False,
) -> None:
    """Handle the options that come before a verb."""
    if world_size() > 1 and context.invoked_subcommand == "run":
        raise UsageError(
            "run starts its processes itself", fix=f"Give --set train.processes={world_size()}, without torchrun."
        )
    if world_size() > 1 and context.invoked_subcommand not in ("uptrain", "eval"):
        raise UsageError("Only uptrain and eval run under torchrun", fix="Start cla-convert without it.")
    if version:
        from ..version import __version__

        data(f"cla-convert {__version__}")
        raise typer.Exit


def load(recipe: str | None, sets: list[str] | None, options: dict[str, Any]) -> "Resolved":
    """A recipe (or the defaults), then --set, then the options of the verb that were given."""
    from ..recipe_file import load_recipe
    from ..recipes import find_recipe

    given = {name: value for name, value in options.items() if value is not None}
    return load_recipe(find_recipe(recipe) if recipe else None, sets, given)


def settings_of(recipe: str | None, sets: list[str] | None, options: dict[str, Any]) -> "Schema":
    """`load` without where each value came from."""
    return load(recipe, sets, options).recipe


def destination(repo: str | None, private: bool) -> "Destination | None":
    """Where to upload, checked before any work; None: nowhere. Raises UsageError, InputError."""
    if repo is None:
        if private:
            raise UsageError("--private has nothing to hide", fix="Give --push-to-hub REPO, too.")
        return None
    from ..models.upload import Destination

    return Destination(repo, private).checked()


def push(hub: "Destination | None", folder: Path) -> dict[str, str]:
    """Upload a finished model, if that was asked for; what to add to the result. Raises InputError, Interrupted."""
    if hub is None:
        return {}
    from ..models.upload import without_local_source
    from ..report.model_card import rename_card

    rename_card(folder, hub.repo)
    with without_local_source(folder):
        return {"uploaded": hub.upload(folder)}


def gate_mode(gate: bool, strict: bool) -> bool | str:
    """The options of a verb as a value of `eval.gate`."""
    return "strict" if strict else gate
