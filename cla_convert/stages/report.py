"""Stage 5, report: say what the run's files say, for people and programs, and on the models' cards."""

from ..console import say
from ..recipe import Recipe
from ..record import recorded
from ..results import Json
from ..run_folder import RunFolder
from ..same_recipe import check_reported


def write_report(recipe: Recipe, folder: RunFolder) -> Json:
    """Write report.json, report.md, report.html and the model cards; returns the report.

    Raises:
        UsageError: what the folder holds was made, or measured, under another recipe.
        InputError: it holds nothing to report, or a file that is damaged.
    """
    from ..report.model_card import source_card, write_model_card
    from ..report.report import build_report

    check_reported(folder, recipe)
    with recorded(recipe, folder, "report"):
        result = build_report(folder.path)
        for point, model in (("converted", folder.converted), ("after", folder.training.model)):
            if model.exists():
                write_model_card(model, result, source_card(folder.source(recipe)), point)
    say(f"report: {folder.pages['html']}")
    return result
