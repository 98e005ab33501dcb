"""What a run writes to disk: the plan says it, and it is compared with what is free before the work begins."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import human_bytes
from ..environment import cache_of, pick_device
from ..files import existing
from ..recipe import Recipe, Train
from ..run_folder import RunFolder, TrainingFolder
from .text import text_tokens

if TYPE_CHECKING:
    from ..conversion.plan import Plan
    from ..models.checkpoint import Checkpoint

_STATE = 12
"""Bytes of a trained parameter in a checkpoint: float32, and two moments of Adam."""
_OTHER, _RECORDS = "records", 250_000
"""Measurements, report and plots, in bytes."""


@dataclass(frozen=True)
class Disk:
    """Bytes of a run, when it holds the most."""

    parts: dict[str, int]
    """Of the run folder, by what people call them."""
    there: int
    """Of these lie there already."""
    cached: dict[str, int]
    """Of the cache folder, by what they are; some may be there."""
    tokens_left: int
    """Bytes of tokens that are still to be written into the cache; of text that was read before they are there."""

    @property
    def needed(self) -> int:
        """Bytes still to be written into the run folder; a finished run finds room for its few records."""
        return max(0, sum(self.parts.values()) - self.parts[_OTHER] - self.there)

    def describe(self) -> str:
        """For a person."""
        cache = f"; in the cache {_listed(self.cached)}" if any(self.cached.values()) else ""
        return f"about {human_bytes(sum(self.parts.values()))} at most: {_listed(self.parts)}{cache}"

    def check(self, folder: Path) -> None:
        """Raise InputError where the disks of the run folder and of the cache have less free."""
        from ..models.writer import check_disk

        cache = cache_of("tokens")
        same = _disk_of(folder) == _disk_of(cache)
        check_disk(folder, self.needed + self.tokens_left * same, "The run needs")
        if self.tokens_left and not same:
            check_disk(cache, self.tokens_left, "Tokens of the text need")


def disk_of(recipe: Recipe, folder: RunFolder, the_plan: "Plan", *, anew: bool = False) -> Disk:
    """What a run leaves and keeps on the way; `anew`: as if nothing of it was finished.

    Checkpoints are there until their model is published: of two trainings, those of one at a time, unless they are to
    be kept.
    """
    from ..models.checkpoint import Checkpoint

    source = Checkpoint.open(folder.source(recipe))
    trainings: list[tuple[str, TrainingFolder, Mapping[str, Any], int]] = []
    if recipe.train.tokens:
        trainings.append(("uptrained", folder.training, the_plan.config(source.config), the_plan.output_bytes))
    if recipe.train.needs_control:
        size = sum(info.nbytes for info in source.tensors.values())
        trainings.append(("control", folder.control, source.config, size))
    done = folder.converted.exists() and not anew
    lying = {"converted": _size(folder.converted) if done else the_plan.output_bytes}
    spilled = 0 if done else _spilled(recipe, source, the_plan)
    most = lying | ({"what matching keeps of the text": spilled} if spilled else {})
    for name, training, student, model in trainings:
        finished = training.model.exists() and not anew
        states, state = (0, 0) if finished else (_states(recipe.train), state_bytes(student, recipe.train))
        kept = min(states, recipe.train.keep_checkpoints)
        moments = (  # while the last checkpoint is written, and when the model is
            {f"checkpoints of {name}": states * state} if states > kept else {},
            {name: model, f"checkpoints of {name}": kept * state},
        )
        most = max([most, *({**lying, **one} for one in moments)], key=lambda parts: sum(parts.values()))
        lying[name] = model
        if recipe.train.keep_checkpoints_after_success:
            lying[f"checkpoints of {name}"] = _size(training.checkpoints) if finished else kept * state
    most = max(most, lying, key=lambda parts: sum(parts.values()))
    ours = [folder.converted, *(one for _, t, _, _ in trainings for one in (t.model, t.checkpoints))]
    there = sum(_size(one) for one in ours if not (anew and one.is_symlink()))  # what a link leads to stays
    cached, left = _cached(recipe, folder, anew=anew)
    return Disk({**most, _OTHER: _RECORDS}, there, cached, left)


def state_bytes(config: Mapping[str, Any], train: Train) -> int:
    """Of a checkpoint, whose numbers are those of the trained parameters."""
    from ..training.optimizer import parts_of, parts_trained
    from ..training.rehearsal import skeleton

    parts = parts_trained(train.parameters)
    return _STATE * sum(parameter.numel() for _, parameter, part in parts_of(skeleton(config)) if part in parts)


def undecided(recipe: Recipe, the_plan: "Plan") -> bool:
    """Whether a plan stands for one that `sharing: auto` has yet to choose."""
    return recipe.convert.sharing == "auto" and the_plan.choice is None


def _spilled(recipe: Recipe, source: "Checkpoint", the_plan: "Plan") -> int:
    """Bytes that lie beside the converted model while it is made, where no memory has room for them."""
    from ..conversion.convert import spilled_bytes
    from ..conversion.sensitivity import Search
    from ..preflight import calibration_length
    from ..training.data import calibration_tokens

    if not recipe.convert.needs_text:
        return 0
    device, sources = pick_device(recipe.device), the_plan.kv_source_layers
    if undecided(recipe, the_plan):  # a bound, also of this
        sources = [0] * Search.default(device).largest
    length = calibration_length(recipe, source.config, device)
    rows = max(1, calibration_tokens(recipe, source, device) // length)
    return spilled_bytes(sources, the_plan.shape.hidden_size, device, rows, length)


def check_room(recipe: Recipe, training: TrainingFolder, student: Path, *, fresh: bool) -> None:
    """Refuse a disk without room for the model and the first checkpoint, before hours of work. Raises InputError."""
    from ..models.checkpoint import Checkpoint
    from ..models.writer import check_disk

    found = Checkpoint.open(student)
    kept = _size(training.checkpoints)
    state = state_bytes(found.config, recipe.train) if fresh or not kept else 0
    freed = kept if fresh else 0  # before the first is written
    needed = sum(info.nbytes for info in found.tensors.values()) + state - freed
    check_disk(training.path, needed, "The model and its first checkpoint need" if state else "The model needs")


def _states(train: Train) -> int:
    """Checkpoints that lie there at once: those kept, and the one that is being written; no more than are ever made."""
    from ..training.schedule import Budget, crossed

    budget = Budget.of(train)
    ends = pairwise(budget.tokens_after(step) for step in range(budget.steps + 1))
    made = sum(after == budget.tokens or crossed(train.checkpoint_every, before, after) for before, after in ends)
    return min(made, train.keep_checkpoints + 1)


def _cached(recipe: Recipe, folder: RunFolder, *, anew: bool) -> tuple[dict[str, int], int]:
    """What lies in the cache folder for a run, and how many bytes of tokens are still to come.

    While sources are put together their tokens lie there twice.
    """
    from ..models.export import load_tokenizer
    from ..training.data import is_kept, tokens_wanted
    from ..training.tokenise import token_dtype

    source, device, calibrates = folder.source(recipe), pick_device(recipe.device), folder.converts
    tokenizer = load_tokenizer(source)
    wanted = sum(tokens_wanted(recipe, source, device, calibrates=calibrates))
    there = text_tokens(recipe, source)
    tokens = token_dtype(tokenizer).itemsize * (wanted if there is None else min(wanted, there))
    made = source.is_relative_to(cache_of("sources").resolve()) or source.is_relative_to(cache_of("sources"))
    begun = folder.begun and not anew
    left = 0 if begun or is_kept(recipe, tokenizer, source, device, calibrates=calibrates) else 2 * tokens
    return {"the model as it is read": _size(source) if made else 0, "tokens": tokens}, left


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(
        name if " checkpoint" in f" {name}" else f"{name} {human_bytes(size)}" for name, size in parts.items() if size
    )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0


def _disk_of(folder: Path) -> int:
    return existing(folder).stat().st_dev
