"""Text from the source model itself: where the corpora do not reach, or for those who have none.

Distilling on the teacher's own samples needs no data (LLM-QAT, Liu et al. 2023, arXiv 2305.17888), and at temperature
1 they have the teacher's distribution. No more is sampled than is asked for, and every batch is kept at once, under a
name that says what it depends on: an interrupted run, or a longer one, continues where the whole batches end.

starts.py makes what texts begin with, decoding.py writes them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from ..console import progress, say, warn
from ..documents import Document
from ..environment import gpu_memory
from ..errors import InputError
from ..files import atomic, read_json, write_json
from ..models.checkpoint import Checkpoint
from ..models.export import load_model
from ..models.fingerprint import fingerprint
from ..models.shape import AttentionShape, shape_of
from ..recipe import Generate, TextSource
from .decoding import Choice, Decoder, Drawn
from .sources import local_files
from .starts import Starts, separator_losses
from .tokenise import leading

_FORMAT = 4  # raise it when the same settings would give other samples
_CPU_ROWS = 64
_MOST_ROWS = 4096
_SHARE = 0.6
"""Of a GPU's memory that we plan to use."""
_LOGIT_BYTES = 32
"""A row and token of the vocabulary: logits as the model gives them, in float32, noise, and what top-p sorts."""
_JUDGED = 16
"""Sampled tokens that a text must have for its perplexity to say anything."""


@dataclass(frozen=True)
class SourceModel:
    """The model that `generate` samples from."""

    folder: Path
    device: str
    cache: Path
    """Where batches of samples are kept."""

    def fingerprint(self) -> str:
        """Identifies the weights, and what ends a text."""
        return f"{fingerprint(self.folder)} {self.ends()}"

    def ends(self) -> list[int]:
        """Tokens that end a text according to the model's generation settings."""
        settings = read_json(self.folder / "generation_config.json") or Checkpoint.open(self.folder).config
        named = settings.get("eos_token_id")
        return [named] if isinstance(named, int) else named or []


def check_sampling(model: SourceModel, tokenizer: Any, settings: Generate) -> None:
    """Find out what sampling would stumble over, without loading the model.

    Raises:
        InputError: there is no chat template where one is needed, or the openings cannot be read.
    """
    Starts(tokenizer, settings, 0, _ends(model, tokenizer))


def sampled(
    model: SourceModel, tokenizer: Any, settings: Generate, seed: int, wanted: Callable[[], int]
) -> Iterator[list[Document]]:
    """Batches of documents of token ids, up to `settings.tokens` in all.

    They are the same for the same model, settings, seed, device and answers of `wanted`; of other answers the first
    batches are the same, as far as they are whole.

    Args:
        model: the source model; loaded only if there is something to sample.
        tokenizer: its tokenizer.
        settings: how to sample.
        seed: seed of the sampling.
        wanted: how many more tokens the caller is going to take, asked before every batch: the last one has as many
            rows as that takes.

    Raises:
        InputError: as `check_sampling`, or memory is too small for the batch.
    """
    check_sampling(model, tokenizer, settings)
    folder = samples_folder(model, tokenizer, settings, seed)
    folder.mkdir(parents=True, exist_ok=True)
    sampler, done, number = None, 0, 0
    most = None if settings.batch_size == "auto" else settings.batch_size
    limit = float("inf") if settings.tokens == "auto" else settings.tokens
    with progress(int(min(wanted(), limit)), "sampling", unit="tok") as bar:
        while (needed := min(wanted(), limit - done)) > 0:
            most = most or automatic_rows(model, settings.length)
            rows = min(most, -int(-needed // (settings.length * (1 - settings.drop))))
            path = folder / f"{number:06d}-{rows}.npz"  # another size: other samples
            if (documents := _kept(path, settings.drop)) is None:
                sampler = sampler or _Sampler(model, tokenizer, settings, folder)
                try:
                    made = sampler.sample(rows, _seed(seed, number), bar)
                    _keep(path, made)
                    documents = made.likely(settings.drop)
                except torch.OutOfMemoryError as error:
                    if rows == 1 or settings.batch_size != "auto":
                        raise InputError(
                            f"Sampling {rows} rows of {settings.length} tokens at a time does not fit into memory",
                            fix="Lower generate.batch_size or generate.length.",
                        ) from error
                    most = rows // 2
                if documents is None:  # outside of the handler, which holds on to what did not fit
                    sampler.forget()
                    say(f"{rows} rows at a time do not fit into memory: trying {most}")
                    continue
            batch = []
            for index, ids in enumerate(documents):
                if (ids := ids[: int(min(limit - done, ids.size))]).size:
                    done += ids.size
                    batch.append(Document(ids, f"{folder.name}/{number}/{index}"))
            bar.move(done)
            yield batch
            number += 1


def about_samples(model: SourceModel, tokenizer: Any, settings: Generate, seed: int) -> dict[str, Any]:
    """What was found out while sampling: the separator and its loss beside other candidates'; empty before."""
    return read_json(samples_folder(model, tokenizer, settings, seed) / "about.json") or {}


def automatic_rows(model: SourceModel, length: int) -> int:
    """Rows of a batch that a device should hold, a multiple of 64 where it holds so many.

    From a GPU's total memory, not what is free just now: the same run on the same machine gives the same samples.
    """
    if (memory := gpu_memory(model.device)) is None:
        return _CPU_ROWS
    checkpoint = Checkpoint.open(model.folder)
    room = _SHARE * memory
    room -= 2 * sum(info.numel for info in checkpoint.tensors.values())
    row = length * shape_of(checkpoint.config).kv_bytes_per_token(2)
    row += _LOGIT_BYTES * int(checkpoint.config.get("vocab_size", 50_000))
    rows = max(1, min(_MOST_ROWS, int(room // row)))
    return rows // 64 * 64 or rows


class _Sampler:
    """The loaded model and what is fixed about its sampling."""

    def __init__(self, model: SourceModel, tokenizer: Any, settings: Generate, folder: Path) -> None:
        self._settings, self._length = settings, settings.length
        dtype = torch.bfloat16 if model.device.startswith("cuda") else torch.float32
        self._model: Any = load_model(model.folder, dtype=dtype, device=model.device)
        self._shape: AttentionShape = shape_of(Checkpoint.open(model.folder).config)
        losses = separator_losses(self._model, tokenizer)
        separator = min(losses, key=losses.__getitem__) if losses else 0
        named = {tokenizer.convert_ids_to_tokens(token): loss for token, loss in losses.items()}
        write_json(
            folder / "about.json",
            {"separator": tokenizer.convert_ids_to_tokens(separator), "separator_id": separator, "losses": named},
        )
        self._ends = _ends(model, tokenizer) | {separator}
        self._starts = Starts(tokenizer, settings, separator, self._ends)
        vocabulary = min(len(tokenizer), self._model.get_output_embeddings().weight.shape[0])
        self._choice = Choice(vocabulary, settings.temperature, settings.top_k, settings.top_p)
        self._decoder: tuple[int, Decoder] | None = None
        say(f"sampling text from {model.folder.name}, {settings.length} tokens a row, on {model.device}")
        say(f"what begins a document, by the loss of real ones behind it: {_ranking(named)}")

    def sample(self, rows: int, seed: int, bar: Any) -> "_Batch":
        """`rows` rows of documents."""
        if self._decoder is None or self._decoder[0] != rows:
            self.forget()
            decoder = Decoder(self._model, self._shape, rows, self._length, self._ends, self._choice)
            self._decoder = rows, decoder
        return _Batch.of(self._decoder[1].draw(*self._starts.draw(rows, seed), seed, bar))

    def forget(self) -> None:
        """Free the cache of the last batch."""
        self._decoder = None
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Batch:
    """Documents one after another."""

    ids: np.ndarray
    lengths: np.ndarray
    losses: np.ndarray
    """Mean loss of the sampled tokens of each document under the model itself; nan where there are too few."""

    @classmethod
    def of(cls, drawn: Drawn) -> "_Batch":
        ids, logprobs, sampled, begins = (
            tensor.flatten().cpu().numpy() for tensor in (drawn.tokens, drawn.logprobs, drawn.sampled, drawn.begins)
        )
        starts = np.flatnonzero(begins)
        counts = np.add.reduceat(sampled.astype(np.int64), starts)
        losses = -np.add.reduceat(logprobs.astype(np.float64), starts) / np.maximum(counts, 1)
        lengths = np.diff(np.append(starts, ids.size))
        return cls(ids.astype(np.uint32), lengths, np.where(counts < _JUDGED, np.nan, losses))

    def likely(self, drop: float) -> list[np.ndarray]:
        """The documents, but for the share that the model itself finds least likely."""
        documents = np.split(self.ids, np.cumsum(self.lengths)[:-1])
        judged = self.losses[~np.isnan(self.losses)]
        if not drop or not judged.size:
            return documents
        bound = np.quantile(judged, 1 - drop)
        return [ids for ids, loss in zip(documents, self.losses, strict=True) if not loss > bound]


def _ends(model: SourceModel, tokenizer: Any) -> set[int]:
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return {*own, *model.ends()}


def _ranking(losses: dict[str, float]) -> str:
    return ", ".join(f"{token} {loss:.2f}" for token, loss in sorted(losses.items(), key=lambda item: item[1]))


def samples_folder(model: SourceModel, tokenizer: Any, settings: Generate, seed: int) -> Path:
    """Where the batches lie that were sampled so."""
    chosen = settings.model_dump(mode="json", exclude={"tokens", "batch_size", "drop"})
    files = local_files(TextSource(path=settings.openings)) if settings.openings else []
    stated = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    parts = [_FORMAT, model.fingerprint(), chosen, seed, leading(tokenizer), tokenizer.all_special_ids, stated]
    return model.cache / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _seed(seed: int, number: int) -> int:
    """Seed of a batch: the batches of one run, and those of neighbouring seeds, have nothing in common."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=7).digest(), "big")


def _keep(path: Path, batch: _Batch) -> None:
    """Publish a batch by rename."""
    with atomic(path) as file:
        np.savez(file, ids=batch.ids, lengths=batch.lengths, losses=batch.losses)


def _kept(path: Path, drop: float) -> list[np.ndarray] | None:
    """The documents of a batch as `likely` gives them; None where there is none, or a damaged one."""
    try:
        with np.load(path) as batch:  # a checksum goes with each array
            return _Batch(batch["ids"], batch["lengths"], batch["losses"]).likely(drop)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        warn(f"{path} is damaged ({error}): it is sampled again")
        return None
