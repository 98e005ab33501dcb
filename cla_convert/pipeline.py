"""`cla-convert run`: recipe -> plan -> convert -> uptrain -> evaluate -> report, over one run folder.

Every stage leaves its result in the run folder by rename and is skipped when that result is there, so the same command
line resumes after any interruption. This file holds the order of things; what a stage does is in stages/.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .console import say
from .recipe import Recipe
from .results import ConvertResult, Json, PlanResult, PointResult, Result, TrainResult
from .run_folder import RunFolder
from .same_recipe import check_same_recipe
from .stages.check import check
from .stages.convert import convert
from .stages.evaluate import evaluate
from .stages.plan import checked_plan, planned
from .stages.report import write_report
from .stages.text import text
from .stages.uptrain import uptrain, uptrain_control

if TYPE_CHECKING:
    from .conversion.plan import Plan

Outcome = PlanResult | ConvertResult | TrainResult | dict[str, PointResult] | Json
"""What the last stage made. Of evaluation: a result a point."""


def run(
    recipe: Recipe,
    out: Path | str,
    *,
    until: str = "report",
    overwrite: bool = False,
    allow_changes: Collection[str] = (),
    introduction: str = "",
) -> Outcome:
    """Do the stages up to `until` in the run folder `out` and return what the last one made.

    Args:
        recipe: what is wanted.
        out: the run folder; what an earlier run of this recipe finished there is kept.
        until: plan, convert, uptrain, eval or report.
        overwrite: start the folder anew.
        allow_changes: settings that may differ from those of the earlier run; see `same_recipe`.
        introduction: to be said once the folder is found to be of this recipe.

    Raises:
        UsageError: the folder holds a run of another recipe.
        InputError, TrainingError, Interrupted: from the stages; what is finished stays.
    """
    folder = RunFolder(out)
    check_same_recipe(folder, recipe, overwrite, allow_changes)
    say(introduction)
    check(recipe, folder, anew=overwrite)
    with folder.alone():
        if until != "plan":
            read_text(recipe, folder)
        if overwrite:
            folder.clear()  # only now: a run that cannot start must not cost the one before it
        folder.save_recipe(recipe)
        outcome: Outcome = {}
        stages = _stages(recipe, folder, allow_changes)
        for number, name in enumerate(STAGES, 1):
            say(f"\n[{number}/{len(STAGES)}] {name}")
            outcome = next(stages)
            if name == until:
                break
        return outcome


STAGES = ("plan", "convert", "uptrain", "eval", "report")


def _stages(recipe: Recipe, folder: RunFolder, allow_changes: Collection[str]) -> Iterator[Outcome]:
    """What each of STAGES makes; it begins when that is asked for."""
    result, the_plan = planned(recipe, folder)
    yield result
    yield convert(recipe, folder, overwrite=True, the_plan=the_plan)
    yield train(recipe, folder, allow_changes)
    yield evaluate(recipe, folder)
    yield write_report(recipe, folder)


def dry_run(
    recipe: Recipe, out: Path | str, *, overwrite: bool, allow_changes: Collection[str], introduction: str = ""
) -> "Plan":
    """The plan of `run`, checked as that is; the run folder is not touched. Raises UsageError, InputError."""
    folder = RunFolder(out)
    check_same_recipe(folder, recipe, overwrite, allow_changes)
    say(introduction)
    check(recipe, folder, anew=overwrite)
    return checked_plan(recipe, folder, anew=overwrite)


def read_text(recipe: Recipe, folder: RunFolder) -> None:
    """Tokenise the data before stage 1: a bad row or too little text is told now. Sampling is left to a stage."""
    from .training.data import check_enough

    if not recipe.data.sampled:
        check_enough(text(recipe, folder), recipe.train)


def train(recipe: Recipe, folder: RunFolder, allow_changes: Collection[str]) -> TrainResult | Json:
    """Uptrain the converted model, then the control where one is asked for."""
    if not recipe.train.tokens:
        say("train.tokens is 0: nothing to train")
        return {}
    result = uptrain(recipe, folder, allow_changes=allow_changes)
    uptrain_control(recipe, folder, allow_changes=allow_changes)
    return result


def to_json(outcome: Outcome) -> Json:
    """What a stage made, for `--json`."""
    if isinstance(outcome, Result):
        return outcome.to_json()
    return {name: value.to_json() if isinstance(value, Result) else value for name, value in outcome.items()}
