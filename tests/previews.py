"""The plan from headers alone against the plan from the weights."""

from pathlib import Path

from cla_convert.environment import cache_folder
from cla_convert.recipe_file import load_recipe
from cla_convert.run_folder import RunFolder
from cla_convert.stages.plan import plan_of, preview


def check_preview(model: Path, where: Path) -> None:
    """Both say the same, and the first writes no copy of the model."""
    recipe = load_recipe(None, [f"source.model={model}", "convert.init=mean", "device=cpu"]).recipe
    sources = cache_folder() / "sources"
    before = {*sources.glob("*")}
    foreseen = preview(recipe, RunFolder(where)).to_json()
    assert {*sources.glob("*")} == before
    planned = plan_of(recipe, RunFolder(where)).to_json()
    for differs in ("source", "output_bytes"):  # where it lies; tokenizer files
        del foreseen[differs], planned[differs]
    assert foreseen == planned
