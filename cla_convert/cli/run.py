"""run: everything, over one run folder."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..console import columns, data, data_json, page
from ..errors import UsageError, did_you_mean
from ..files import load_json
from .app import (
    AllowChanges,
    AllowPickle,
    Gate,
    GateStrict,
    IncludePath,
    Json,
    Private,
    PushToHub,
    Quiet,
    Sets,
    TaskData,
    app,
    destination,
    gate_mode,
    load,
    push,
)


@app.command(epilog="Example: cla-convert run smollm2-135m --out runs/mine --set train.tokens=100M")
def run(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="Recipe file, - for stdin, or a shipped one (demo).", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Run folder; rerunning the same line resumes.", show_default=False)
    ],
    sets: Sets = None,
    until: Annotated[
        str, typer.Option(metavar="STAGE", help="Stop after this stage: plan, convert, uptrain, eval or report.")
    ] = "report",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; the run folder is not touched.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Start the run folder anew.")] = False,
    allow_changes: AllowChanges = None,
    allow_pickle: AllowPickle = False,
    task_data: TaskData = None,
    include_path: IncludePath = None,
    gate: Gate = False,
    gate_strict: GateStrict = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Do it all: plan, convert, uptrain, evaluate, report.

    Rerunning the same line resumes where it stopped. Several GPUs? --set train.processes=N
    """
    mode = gate_mode(gate, gate_strict)
    options = {
        "source.allow_pickle": allow_pickle or None,
        "eval.task_data": task_data,
        "eval.include_path": include_path,
        "eval.gate": mode or None,
    }
    resolved = load(recipe, sets, options)
    from .. import pipeline
    from ..evaluation.gate import enforce
    from ..report.last_lines import last_lines
    from ..run_folder import RunFolder
    from ..stages.plan import shown

    if until not in pipeline.STAGES:
        stages: list[str] = [*pipeline.STAGES]
        raise UsageError(
            f"There is no stage {until!r}.{did_you_mean(until, stages)}", fix=f"Stages: {', '.join(stages)}"
        )
    if mode and until not in ("eval", "report"):
        raise UsageError("--gate has nothing to judge", why=f"--until {until} stops before the evaluation.")
    if push_to_hub and until == "plan":
        raise UsageError("--push-to-hub has nothing to upload", why="--until plan stops before there is a model.")
    if dry_run:
        planned = pipeline.dry_run(
            resolved.recipe, out, overwrite=overwrite, allow_changes=allow_changes or (), introduction=resolved.table()
        )
        data_json(planned.to_json()) if as_json else page(shown(resolved.recipe, planned))
        return
    hub = destination(push_to_hub, private)
    result = pipeline.run(
        resolved.recipe,
        out,
        until=until,
        overwrite=overwrite,
        allow_changes=allow_changes or (),
        introduction=resolved.table(),
    )
    folder = RunFolder(out)
    if as_json:
        data_json(pipeline.to_json(result))
    elif until == "report":
        data("\n".join(last_lines(pipeline.to_json(result), folder, min(80, columns(sys.stdout)))))
    if (mode := resolved.recipe.eval.gate) and until in ("eval", "report"):
        enforce(load_json(folder.evaluation.comparison), mode)
    trained = resolved.recipe.train.tokens and until != "convert"
    push(hub, folder.training.model if trained else folder.converted)  # not reached by one that failed the gate
