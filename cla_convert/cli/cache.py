"""Verbs of the cache: cache ls|prune."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..console import data_json, human_bytes, page, say
from ..environment import cache_folder
from .app import Json, Quiet, app
from .verbs import Verbs
from .words import whole

if TYPE_CHECKING:
    from ..kept import Entry

cache_app = Verbs(
    help="Show what the cache holds, or remove what is not used any more.",
    epilog="Example: cla-convert cache ls",
    no_args_is_help=True,
)
app.add_typer(cache_app, name="cache")

_LONG = 30
"""Days after which something is taken for forgotten."""


@cache_app.command("ls", epilog="Example: cla-convert cache ls --json")
def cache_ls(as_json: Json = False, quiet: Quiet = False) -> None:
    """Show what the cache holds.

    Models dequantised or rewritten, tokenised and sampled text, results: all of it is made again when it is needed.
    """
    from ..kept import entries

    folder, found = cache_folder(), entries(cache_folder())
    if as_json:
        data_json(_as_json(found))
        return
    lines = [f"{folder}: {human_bytes(sum(entry.bytes for entry in found))}"]
    lines += [_line(entry.bytes, entry.days, _name(entry)) for entry in found if entry.path.is_dir()]
    for kind in sorted({entry.path.parent.name for entry in found if not entry.path.is_dir()}):
        files = [entry for entry in found if entry.path.parent.name == kind and not entry.path.is_dir()]
        size, days = sum(entry.bytes for entry in files), min(entry.days for entry in files)
        lines.append(_line(size, days, f"{kind}/ ({len(files)} file{'s' * (len(files) > 1)})"))
    page("\n".join(lines))
    if any(entry.days >= _LONG for entry in found):
        say(f"next        cla-convert cache prune --days {_LONG}")


@cache_app.command("prune", epilog="Example: cla-convert cache prune --days 7")
def cache_prune(
    days: Annotated[
        int,
        typer.Option(metavar="N", parser=whole("--days", 0, _LONG), help="Not used for so many days; 0: everything."),
    ] = _LONG,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go and remove nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove what was not used for some days.

    Such as copies of models that have changed since. --days 0 is for when nothing else runs.
    """
    from ..kept import entries, remove

    gone = []
    for entry in entries(cache_folder()):
        if entry.days >= days and (dry_run or remove(entry)):
            gone.append(entry)
            say(f"{'would remove' if dry_run else 'removed'} {_name(entry)} ({human_bytes(entry.bytes)})")
    freed = human_bytes(sum(entry.bytes for entry in gone))
    data_json(_as_json(gone)) if as_json else page(f"{freed} {'would be freed' if dry_run else 'freed'}")


def _line(size: int, days: int, name: str) -> str:
    used = "today" if not days else f"{days} days ago" if days > 1 else "yesterday"
    return f"{human_bytes(size):>10}  {used:<13} {name}"


def _name(entry: "Entry") -> str:
    return f"{entry.path.parent.name}/{entry.path.name}"


def _as_json(found: "list[Entry]") -> dict[str, object]:
    listed = [{"name": _name(entry), "bytes": entry.bytes, "days_unused": entry.days} for entry in found]
    return {"folder": str(cache_folder()), "bytes": sum(entry.bytes for entry in found), "entries": listed}
