"""report: what the files of a run say."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import data, data_json, say
from ..errors import InputError, UsageError
from .app import Gate, GateStrict, Json, Quiet, app, gate_mode


@app.command(epilog="Example: cla-convert report runs/mine")
def report(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_DIR", help="Run folder; more of them to compare it with.", show_default=False),
    ],
    gate: Gate = False,
    gate_strict: GateStrict = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rebuild the report from the files of a run folder.

    With several folders, the report of the first one shows all of them: quality against KV bytes per token.
    """
    from ..run_folder import RunFolder

    folders = [RunFolder(run_dir) for run_dir in run_dirs]
    for folder in folders:
        if not folder.recipe.exists():
            raise InputError(
                f"{folder.path} is not a run folder",
                why=f"It has no {folder.recipe.name}.",
                fix="Give --out of `cla-convert run`.",
            )
    if twice := next((one for i, one in enumerate(run_dirs) if _same(one, run_dirs[:i])), None):
        raise UsageError(
            f"{twice} would be compared with itself",
            why="The same folder is named twice.",
            fix="Name each once; for its report alone only that.",
        )
    say("building the report ...")  # matplotlib takes seconds to import, on a busy machine many
    from ..evaluation.gate import enforce
    from ..report.report import build_report

    result = build_report(run_dirs[0], run_dirs[1:])
    data_json(result) if as_json else data(str(folders[0].pages["html"]))
    enforce(result, gate_mode(gate, gate_strict))


def _same(folder: Path, others: list[Path]) -> bool:
    return any(folder.samefile(other) for other in others)
