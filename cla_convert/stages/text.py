"""The text of a run: one token store for all stages, and what conversion and evaluation take of it."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import human_count, say, say_once
from ..environment import pick_device
from ..recipe import Data, Recipe
from ..run_folder import RunFolder

if TYPE_CHECKING:
    from ..conversion.initialisation import CalibrationText
    from ..training.data import TokenStore


UNTAUGHT = (
    "the model has a chat template, and none of the text is conversations: it will follow instructions worse. If that "
    "matters, make half of the text conversations (docs/uptraining.md, Instruct models)"
)


def text(recipe: Recipe, folder: RunFolder) -> "TokenStore":
    """The tokens of the recipe's data: read (or sampled) and tokenised once, then found in the cache.

    Raises:
        InputError: a source cannot be read or holds no text.
    """
    from ..models.export import load_tokenizer
    from ..training.data import store_for

    source = folder.source(recipe)
    return store_for(recipe, load_tokenizer(source), source, pick_device(recipe.device), calibrates=folder.converts)


def text_tokens(recipe: Recipe, model: Path) -> int | None:
    """About how many tokens of text the recipe's data hold for the model in a folder, read or not; None if unknown."""
    from ..training.sources import local_files

    files = (file for source in recipe.data.sources if source.path for file in local_files(source))
    stated = tuple((file, (about := file.stat()).st_size, about.st_mtime_ns) for file in files)
    return _text_tokens(recipe.data.model_dump_json(), recipe.seed, model, stated)


@cache
def _text_tokens(data: str, seed: int, model: Path, stated: tuple[Any, ...]) -> int | None:  # of these files
    from ..models.export import load_tokenizer
    from ..training.text_size import tokens_there

    return tokens_there(Data.model_validate_json(data), load_tokenizer(model), seed)


def say_untaught(recipe: Recipe, tokenizer: Any) -> None:
    """Say so, once, where an instruct model is to be trained without conversations."""
    from ..training.mixture import share_of_chats

    converses = getattr(tokenizer, "chat_template", None)
    if recipe.train.tokens and converses and not any(map(share_of_chats, recipe.data.sources)):
        say_once(UNTAUGHT)


def calibration(recipe: Recipe, folder: RunFolder) -> "CalibrationText | None":
    """Text for calibrated pooling; None for the other initialisations. Raises InputError, as `text`."""
    if not recipe.convert.needs_text:
        return None
    import torch

    from ..conversion.factories import devices_for
    from ..conversion.initialisation import CalibrationText
    from ..models.checkpoint import Checkpoint
    from ..models.shape import shape_of
    from ..preflight import calibration_length
    from ..training.data import calibration_rows, calibration_tokens

    store, source = text(recipe, folder), Checkpoint.open(folder.source(recipe))
    device = pick_device(recipe.device)
    length = calibration_length(recipe, source.config, device)
    wanted = calibration_tokens(recipe, source, device)
    rows = torch.from_numpy(calibration_rows(store, wanted, length, recipe.seed))
    gpus = len(devices_for(device, shape_of(source.config).hidden_size, len(rows)))
    where = f" on {gpus} GPUs" if gpus > 1 else ""
    short = f" of {human_count(wanted)}: the data holds no more" if store.train.size < wanted else ""
    say(f"calibrating on {human_count(rows.numel())} tokens{short}{where}")
    return CalibrationText(rows, store.digest, device, recipe.seed, recipe.convert.calibration.steps)
