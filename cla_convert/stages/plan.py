"""Stage 1, plan: read the source's headers and say what will happen."""

from dataclasses import replace
from typing import TYPE_CHECKING

from ..amounts import clock, human_count
from ..console import say, warn
from ..effort import MANY_PASSES
from ..environment import cache_of, pick_device
from ..files import read_rows
from ..preflight import calibration_length, check_tokenizer
from ..recipe import Recipe
from ..record import recorded
from ..results import PlanResult
from ..run_folder import RunFolder
from ..same_recipe import continue_under
from .disk import disk_of, undecided
from .text import calibration, text_tokens

if TYPE_CHECKING:
    from ..conversion.auto import Choice
    from ..conversion.plan import Plan
    from ..models.checkpoint import Checkpoint


def plan(recipe: Recipe, folder: RunFolder) -> PlanResult:
    """Plan the conversion, and say what training will need.

    Raises:
        UsageError: the sharing is unknown or impossible for this model, or the folder is of another recipe.
        InputError: the model cannot be converted, or the device has too little memory to train it.
    """
    return planned(recipe, folder)[0]


def planned(recipe: Recipe, folder: RunFolder) -> "tuple[PlanResult, Plan]":
    """The same, and the plan itself for `convert`: `sharing: auto` chooses once."""
    continue_under(recipe, folder)
    with recorded(recipe, folder, "plan"):
        the_plan = plan_of(recipe, folder)
        say(shown(recipe, the_plan))
        _say_needs(recipe, folder, the_plan)
        result = PlanResult.model_validate(the_plan.to_json())
        return result if folder.plan.read() == result else folder.plan.write(result), the_plan


def checked_plan(recipe: Recipe, folder: RunFolder, *, anew: bool) -> "Plan":
    """The same, and nothing is written; `anew`: as if the folder were empty."""
    the_plan = _without_sampling(recipe, folder, anew=anew)
    _say_needs(recipe, folder, the_plan, anew=anew)
    return the_plan


_UNDECIDED = (
    "sharing: auto has not chosen yet: it measures on text that the model writes first. Until then this is the plan of "
    "a model in which no layer shares"
)


def _without_sampling(recipe: Recipe, folder: RunFolder, *, anew: bool) -> "Plan":
    """The plan; where `sharing: auto` would measure on text that the model has yet to write, for minutes, its bound."""
    if not (_measures(recipe, folder, anew=anew) and recipe.data.sampled):
        return plan_of(recipe, folder, anew=anew)
    from ..conversion.plan import NO_LAYER_SHARES

    the_plan = bound(recipe, folder, anew=anew)
    others = [warning for warning in the_plan.warnings if warning != NO_LAYER_SHARES]  # it will share
    return replace(the_plan, warnings=[_UNDECIDED, *others])


def _measures(recipe: Recipe, folder: RunFolder, *, anew: bool) -> bool:
    """Whether `sharing: auto` has yet to choose."""
    return recipe.convert.sharing == "auto" and (anew or not _chosen_before(folder))


def plan_of(recipe: Recipe, folder: RunFolder, *, anew: bool = False) -> "Plan":
    """The conversion plan of a recipe; `sharing: auto` measures first. Raises UsageError, InputError.

    A folder whose model is converted keeps the map that was chosen for it, also where training goes on with other text
    or more of it than the choice was measured on; not if it is to be made `anew`.
    """
    from ..models.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder.source(recipe))
    _check(recipe, checkpoint)
    chosen = None if anew else _chosen_before(folder)
    return _plan(recipe, checkpoint, chosen or _choice(recipe, folder, checkpoint))


def bound(recipe: Recipe, folder: RunFolder, *, anew: bool) -> "Plan":
    """The plan, or where `sharing: auto` has yet to measure, one that writes no less: every layer keeps its K/V.

    Raises UsageError, InputError.
    """
    from ..models.checkpoint import Checkpoint

    if not _measures(recipe, folder, anew=anew):
        return plan_of(recipe, folder, anew=anew)
    checkpoint = Checkpoint.open(folder.source(recipe))
    _check_rows(recipe, checkpoint)
    whole = recipe.convert.model_copy(update={"sharing": "cla1", "kv_budget": None})
    return _plan(recipe.model_copy(update={"convert": whole}), checkpoint, None)


def shown(recipe: Recipe, the_plan: "Plan") -> str:
    """A plan for a person."""
    return the_plan.render(recipe.source.model, pick_device(recipe.device))


def preview(recipe: Recipe, folder: RunFolder) -> "Plan":
    """The same without the weights, where headers are enough: nothing is fetched, dequantised or unpacked for it.

    Of the tokenizer only what lies beside the headers is looked at. Raises UsageError, InputError.
    """
    from ..models.source import open_headers

    if recipe.convert.sharing == "auto" or recipe.source.allow_pickle or recipe.source.text_only:
        return _without_sampling(recipe, folder, anew=False)
    checkpoint = open_headers(recipe.source.model, revision=recipe.source.revision, to_convert=True)
    _check(recipe, checkpoint, tokenizer=(checkpoint.folder / "tokenizer_config.json").exists())
    return _plan(recipe, checkpoint, None)


def _check(recipe: Recipe, checkpoint: "Checkpoint", *, tokenizer: bool = True) -> None:
    """Raise InputError for what a conversion would meet later."""
    from ..conversion.supported import check_convertible
    from ..models.export import load_tokenizer
    from ..models.self_test import check_interface
    from ..models.tokenization import has_tokenizer

    check_interface(checkpoint.config.get("model_type", ""))
    check_convertible(checkpoint)  # first of all: it has more to say than a tokenizer that is not there
    if tokenizer and (recipe.convert.needs_text or has_tokenizer(checkpoint.folder)):
        check_tokenizer(load_tokenizer(checkpoint.folder), checkpoint.config)


def _plan(recipe: Recipe, checkpoint: "Checkpoint", choice: "Choice | None") -> "Plan":
    from ..conversion.plan import make_plan
    from ..training.data import calibration_tokens

    return make_plan(
        checkpoint,
        sharing=choice.kv_source_layers if choice else recipe.convert.sharing,
        init=recipe.convert.init,
        kv_heads=recipe.convert.kv_heads,
        dtype=recipe.source.dtype,
        calibration_tokens=calibration_tokens(recipe, checkpoint, pick_device(recipe.device)),
        choice=choice,
    )


def _chosen_before(folder: RunFolder) -> "Choice | None":
    """What `sharing: auto` chose for the model that lies there."""
    from ..conversion.auto import Choice

    done = folder.convert.read() if folder.converted.exists() else None
    return Choice.from_json(done.auto) if done and done.auto else None


def _choice(recipe: Recipe, folder: RunFolder, checkpoint: "Checkpoint") -> "Choice | None":
    """What `sharing: auto` chooses."""
    if recipe.convert.sharing != "auto":
        return None
    from ..conversion.auto import choose
    from ..conversion.kv_heads import check_kv_heads
    from ..conversion.supported import check_convertible
    from ..models.finite import naming_not_finite

    _check_rows(recipe, checkpoint)
    family, shape, unused, _ = check_convertible(checkpoint)
    heads = check_kv_heads(recipe.convert.kv_heads, family, shape)
    looks_at = calibration(recipe, folder)
    assert looks_at is not None, "the recipe's schema wants `init: calibrated` here"
    with naming_not_finite(checkpoint, unused):
        return choose(checkpoint, shape, heads, recipe.convert.kv_budget, looks_at, cache_of("damage"))


def _check_rows(recipe: Recipe, checkpoint: "Checkpoint") -> None:
    """Raise InputError if the calibration asked for is too little to choose a map by, before any text is read."""
    from ..conversion.sensitivity import Search
    from ..training.data import calibration_tokens

    device = pick_device(recipe.device)
    length = calibration_length(recipe, checkpoint.config, device)
    Search.default(device).check_rows(max(1, calibration_tokens(recipe, checkpoint, device) // length), length)


def _say_needs(recipe: Recipe, folder: RunFolder, the_plan: "Plan", *, anew: bool = False) -> None:
    """Say what training needs: memory, disk, and text for its budget. Raises InputError where memory is too small."""
    if not undecided(recipe, the_plan):  # what is trained depends on the map
        _check_memory(recipe, folder, the_plan)
    say(f"disk        {disk_of(recipe, folder, the_plan, anew=anew).describe()}")
    _say_passes(recipe, folder)


def _check_memory(recipe: Recipe, folder: RunFolder, the_plan: "Plan") -> None:
    """Say what training will need. Raises InputError, with what does fit, if the device has less."""
    from ..models.checkpoint import Checkpoint
    from ..training.layout import Layout
    from ..training.micro_batch import forecast

    if not recipe.train.tokens:
        return
    source, teacher = (Checkpoint.open(find(recipe)).config for find in (folder.source, folder.teacher))
    students = {folder.training.model: the_plan.config(source)}
    students |= {folder.control.model: source} if recipe.train.needs_control else {}
    for model, student in students.items():
        if not model.exists():  # else it was trained, perhaps on another machine
            layout = Layout.of(recipe.train, recipe.train.processes)
            foreseen, rows = forecast(recipe.train, student, teacher, pick_device(recipe.device), layout)
            say(f"training    {foreseen.describe(rows)}")


def _say_passes(recipe: Recipe, folder: RunFolder) -> None:
    """Say how often the budget goes round the text and, where a speed was measured in the folder, how long it takes."""
    from ..training.text_size import in_passes

    tokens = recipe.train.tokens
    if not tokens:
        return
    there = text_tokens(recipe, folder.source(recipe))
    rates = [row["tokens_per_second"] for row in read_rows(folder.training.metrics) if row.get("tokens_per_second")]
    parts = [f"{human_count(tokens)} tokens", *([in_passes(tokens, there)] if there else [])]
    parts += [f"about {clock(tokens / rate)} at the {human_count(rate)} tokens/s of this folder" for rate in rates[-1:]]
    say(f"budget      {', '.join(parts)}")
    if there and tokens > MANY_PASSES * there:
        warn(
            f"{in_passes(tokens, there)}: after {MANY_PASSES} or so they teach little. Give more text (data.sources), "
            f"about {human_count(tokens / MANY_PASSES)} tokens, or lower train.tokens"
        )
