"""Documents -> tokens -> packed sequences.

`prepare_data` tokenises a mixture of sources once, only as far as asked, and keeps the result in a cache keyed by
everything it depends on; `Sequences` then cuts the stream into rows. On the way: sources.py reads documents
(sampling.py makes them), tokenise.py splits and tokenises a source, mixture.py puts the sources together.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..amounts import times
from ..console import human_count, say
from ..effort import affordable_tokens
from ..environment import cache_of, gpu_memory
from ..errors import InputError
from ..files import load_json, read_kept, write_json
from ..kept import kept
from ..models.checkpoint import Checkpoint
from ..models.shape import shape_of
from ..models.writer import disk_full_is_an_input_error
from ..preflight import fitted_source
from ..recipe import Data, Recipe, TextSource, Train
from .mixture import Mixture
from .sampling import SourceModel, check_sampling, samples_folder
from .sequences import Sequences
from .sources import documents, is_local, local_files, pinned, sample_source
from .tokenise import leading

__all__ = ["Sequences", "TokenStore", "calibration_rows", "held_out_rows", "prepare_data", "store_for"]

_WIDER, _VARIED = 16, 1_000_000
"""A little calibration text is taken from so many times as much, up to a million tokens: a few rows each of many
documents say more than all of a few. Sampled text is too dear for that."""
_FILES = ("train.bin", "starts.bin", "held_out.bin")
_FORMAT = 12  # raise it when the same settings would give other tokens


@dataclass(frozen=True)
class TokenStore:
    """Tokens of all documents one after another; the two sides share no document.

    Texts are ended by EOS; conversations, and what a model wrote, by what they end with.
    """

    train: np.ndarray
    held_out: np.ndarray
    digest: str
    """Hash of the tokens themselves."""
    info: dict[str, Any]
    """Documents and tokens, in all and per source."""
    starts: np.ndarray
    """Offsets in `train` where documents begin, ascending, int64."""

    @property
    def first(self) -> tuple[int, ...]:
        """What every row begins with: what the tokenizer puts in front of a text, such as BOS."""
        return tuple(self.info.get("leading", ()))


def prepare_data(
    data: Data,
    tokenizer: Any,
    *,
    tokens: int,
    held_out_tokens: int,
    cache_dir: Path,
    seed: int,
    model: SourceModel | None = None,
) -> TokenStore:
    """Return at most `tokens` training tokens and `held_out_tokens` held-out tokens, as read-only memory maps.

    Fewer where the sources hold less: `Sequences` then goes round again.

    Raises:
        InputError: a source is missing, unreadable, empty, or has no such column.
    """
    return _prepared(_mixture(data, tokenizer, tokens, held_out_tokens, seed, model), cache_dir)


def check_enough(store: TokenStore, train: Train) -> None:
    """Raise InputError if the text holds not even one sequence to train on, or none to measure on."""
    if train.tokens:
        Sequences(store.train, train.sequence_length, seed=0)
    held_out_rows(store, train)


def say_passes(store: TokenStore, budget: int) -> None:
    """Say so where training goes round the text more than once."""
    if 0 < store.train.size < budget:
        say(
            f"The data holds {human_count(store.train.size)} training tokens for a budget of {human_count(budget)}: "
            f"they are repeated, {times(budget / store.train.size)} passes in all."
        )


def check_data(recipe: Recipe, tokenizer: Any, source: Path, device: str) -> None:
    """Open every source of text: is it there, can it be read, can the model be sampled from? Raises InputError."""
    model = _source_model(source, device)
    for text in (_resolved(source, model) for source in recipe.data.sources):
        if text.generate:
            check_sampling(model, tokenizer, text.generate)
        else:
            next(documents(text, recipe.seed, tokenizer), None)


def store_for(recipe: Recipe, tokenizer: Any, source: Path, device: str, *, calibrates: bool = True) -> TokenStore:
    """The token store of a recipe, for every stage alike: asking for the same tokens means tokenising once.

    Args:
        recipe: what to read, and how much of it.
        tokenizer: of the source model.
        source: folder of the source model, which sources with `generate` sample from.
        device: where they sample.
        calibrates: whether a conversion takes text from it, too.

    Raises:
        InputError: as `prepare_data`.
    """
    return _prepared(_mixture_of(recipe, tokenizer, source, device, calibrates=calibrates), cache_of("tokens"))


def is_kept(recipe: Recipe, tokenizer: Any, source: Path, device: str, *, calibrates: bool) -> bool:
    """Whether what `store_for` gives lies in the cache already; no for sampled text, as only all weights tell."""
    if recipe.data.sampled:
        return False
    mixture = _mixture_of(recipe, tokenizer, source, device, calibrates=calibrates)
    return (cache_of("tokens") / _cache_key(mixture)).exists()


def tokens_wanted(recipe: Recipe, source: Path, device: str, *, calibrates: bool) -> tuple[int, int]:
    """Tokens that are asked of the text: to train and calibrate on, and to hold out."""
    calibration = calibration_tokens(recipe, source, device) if calibrates else 0
    needed = max(recipe.train.tokens, calibration)
    wide = needed if recipe.data.sampled else max(needed, min(_VARIED, _WIDER * calibration))
    return wide, max(recipe.train.validation_tokens, recipe.train.sequence_length + 1)


def _mixture_of(recipe: Recipe, tokenizer: Any, source: Path, device: str, *, calibrates: bool) -> Mixture:
    wanted = tokens_wanted(recipe, source, device, calibrates=calibrates)
    return _mixture(recipe.data, tokenizer, *wanted, recipe.seed, _source_model(source, device))


def _mixture(
    data: Data, tokenizer: Any, tokens: int, held_out_tokens: int, seed: int, model: SourceModel | None
) -> Mixture:
    sources = [_resolved(source, model) for source in data.sources or [sample_source()]]
    return Mixture(sources, tokens, held_out_tokens, data.held_out, tokenizer, seed, model)


def _prepared(mixture: Mixture, cache_dir: Path) -> TokenStore:
    folder = cache_dir / _cache_key(mixture)
    with disk_full_is_an_input_error(cache_dir):
        return _open(kept(folder, partial(_write, mixture), intact=_intact))


def _resolved(source: TextSource, model: SourceModel | None) -> TextSource:
    """As it is read: in one revision, and in rows that the model can write."""
    config = Checkpoint.open(model.folder).config if source.generate and model else {}
    return fitted_source(pinned(source), config)


def _source_model(folder: Path, device: str) -> SourceModel:
    return SourceModel(folder, device, cache_of("samples"))


def calibration_tokens(recipe: Recipe, source: Path | Checkpoint, device: str) -> int:
    """Tokens that converting a model, or the one in a folder, asks for; 0 where it looks at none."""
    if not recipe.convert.needs_text:
        return 0
    if recipe.convert.calibration.tokens != "auto":
        return recipe.convert.calibration.tokens
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    parameters = sum(tensor.numel for tensor in checkpoint.tensors.values())
    width = shape_of(checkpoint.config).hidden_size
    return affordable_tokens(parameters, device, width=width, memory=gpu_memory(device))


def calibration_rows(store: TokenStore, tokens: int, length: int, seed: int) -> np.ndarray:
    """Training rows for calibrated pooling, about `tokens` tokens: int64 [n, length]; the same ones for a seed.

    In another order than uptraining visits them, whose first steps would otherwise see the text already fitted to.
    """
    length = min(length, store.train.size)
    rows = Sequences(store.train, length, seed + 1, first=store.first)
    return rows.rows(min(rows.count, max(1, tokens // length)))


def held_out_rows(store: TokenStore, train: Train) -> np.ndarray:
    """Rows for validation and held-out perplexity, always the same ones: int64 [n, T], T at most sequence_length."""
    length = min(train.sequence_length, store.held_out.size)
    if length < 2:
        raise InputError("There is no held-out text", fix="Give more documents, or raise data.held_out.")
    rows = Sequences(store.held_out, length, seed=0, first=store.first)
    return rows.rows(min(rows.count, max(1, train.validation_tokens // length)))


def _cache_key(mixture: Mixture) -> str:
    """Hash of everything the tokens depend on: what the sources are and hold, the tokenizer, the amounts, the seed."""
    files = [file for s in mixture.sources if s.path or is_local(s) for file in local_files(s)]
    backend = getattr(mixture.tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(mixture.tokenizer.get_vocab(), sort_keys=True)
    samples = [
        samples_folder(mixture.model, mixture.tokenizer, source.generate, mixture.seed).name
        for source in mixture.sources
        if source.generate and mixture.model
    ]
    parts = [
        _FORMAT,
        [source.model_dump(mode="json") for source in mixture.sources],
        [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        samples,
        [mixture.share, mixture.tokens, mixture.held_out_tokens, mixture.seed],
        [mixture.tokenizer.chat_template for source in mixture.sources if source.messages_field],
        [vocabulary, leading(mixture.tokenizer), mixture.tokenizer.bos_token_id, mixture.tokenizer.eos_token_id],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _write(mixture: Mixture, folder: Path) -> None:
    info = mixture.build(folder) | {"leading": leading(mixture.tokenizer)}
    write_json(folder / "info.json", info | {"digest": _digest(folder)})


def _intact(folder: Path) -> bool:
    """Whether the tokens are those that were written. Looked at once in a process, and again if a file has changed."""
    info = read_kept(folder / "info.json") or {}
    states = [(folder / name).stat() for name in _FILES]
    return info.get("digest") == _known_digest(folder, tuple((s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for s in states))


@cache
def _known_digest(folder: Path, _states: tuple[tuple[int, ...], ...]) -> str:
    return _digest(folder)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in _FILES:
        with (folder / name).open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        digest.update(name.encode())
    return digest.hexdigest()


def _open(folder: Path) -> TokenStore:
    info = load_json(folder / "info.json")

    def array(name: str, dtype: str) -> np.ndarray:
        path = folder / f"{name}.bin"
        if not path.stat().st_size:  # an empty file cannot be mapped
            return np.empty(0, dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r")

    train, held_out = (array(name, info["dtype"]) for name in ("train", "held_out"))
    return TokenStore(train, held_out, info.pop("digest"), info, array("starts", "int64"))
