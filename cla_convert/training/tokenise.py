"""A mixture of documents, split and tokenised into two files of tokens."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..console import progress, warn
from ..errors import InputError
from ..recipe import TextSource
from .sources import SAMPLE, Document, documents


@dataclass
class Side:
    """One side of the split while it is being written."""

    limit: int
    file: BinaryIO
    tokens: int = 0
    documents: int = 0
    per_source: dict[int, int] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.tokens >= self.limit

    def add(self, source: int, ids: np.ndarray) -> int:
        """Append tokens, cut where the limit is reached; returns how many were taken."""
        ids = ids[: self.limit - self.tokens]
        if ids.size:
            ids.tofile(self.file)
            self.tokens += ids.size
            self.per_source[source] = self.per_source.get(source, 0) + ids.size
        return ids.size


class Builder:
    """Reads, splits, tokenises and writes, until both sides are full or the sources are exhausted."""

    def __init__(
        self, sources: list[TextSource], share: float, tokenizer: Any, tokens: int, held_out_tokens: int, seed: int
    ) -> None:
        self.sources, self.share, self.tokenizer, self.seed = sources, share, tokenizer, seed
        self.limits = (tokens, held_out_tokens)
        self.dtype = token_dtype(tokenizer)
        # Small batches keep the mixture even when the budget is small; 64k characters keep the tokenizer busy.
        self.batch_characters = max(4096, min(65_536, tokens // (2 * len(sources))))

    def build(self, folder: Path) -> dict[str, Any]:
        """Write train.bin and held_out.bin into `folder`; returns the info."""
        with (folder / "train.bin").open("w+b") as train_file, (folder / "held_out.bin").open("w+b") as held_out_file:
            train, held_out = Side(self.limits[0], train_file), Side(self.limits[1], held_out_file)
            with progress(sum(self.limits), "tokenising", unit="tok") as bar:
                self._fill(train, held_out, bar)
            if not train.tokens and not held_out.tokens:
                raise InputError(
                    "The data sources hold no text", "Every document is empty.", "Check data.sources and text_field."
                )
            fallback = 0
            if not held_out.tokens and held_out.limit:
                fallback = self._hold_out_tail(train, held_out)
        return self._info(train, held_out, fallback)

    def _fill(self, train: Side, held_out: Side, bar: Any) -> None:
        streams = {i: documents(source, self.seed) for i, source in enumerate(self.sources)}
        # Validation on a single long book would say little: a document's beginning first, the rest only if it must be.
        cap = max(64, held_out.limit // 8)
        spare: list[tuple[int, np.ndarray]] = []
        read = dict.fromkeys(streams, 0)  # characters, to take turns once the training side is full
        while streams and not (train.full and held_out.full):
            taken = read if train.full else train.per_source
            index = min(streams, key=lambda i: taken.get(i, 0) / self.sources[i].weight)
            batch = _take(streams[index], self.batch_characters)
            if not batch:
                del streams[index]
                if streams and not train.full:
                    warn(f"source {index + 1} of {len(self.sources)} ran out before its share: the others fill up")
                continue
            read[index] += sum(len(document.text) for document in batch)
            for side, members in self._split(train, held_out, batch):
                for ids in encode(self.tokenizer, [document.text for document in members], self.dtype):
                    side.documents += not side.full
                    if side is held_out:
                        ids, rest = ids[:cap], ids[cap : held_out.limit]
                        spare.append((index, rest))
                    bar.update(side.add(index, ids))
        for index, rest in spare:
            bar.update(held_out.add(index, rest))

    def _split(self, train: Side, held_out: Side, batch: list[Document]) -> Iterator[tuple[Side, list[Document]]]:
        """The batch by side, without what a full side no longer needs."""
        mine = [is_held_out(document.key, self.seed, self.share) for document in batch]
        for side, wanted in ((train, False), (held_out, True)):
            members = [document for document, held in zip(batch, mine, strict=True) if held is wanted]
            if members and not side.full:
                yield side, members

    def _hold_out_tail(self, train: Side, held_out: Side) -> int:
        """Too few documents for the split: move the end of the training tokens over. Returns the tokens moved."""
        moved = min(held_out.limit, int(train.tokens * self.share))
        warn(
            f"none of the {train.documents} documents fell into the held-out share: the last {moved} tokens are held "
            "out instead. More documents give a cleaner split."
        )
        train.file.seek((train.tokens - moved) * self.dtype.itemsize)
        held_out.file.write(train.file.read())
        train.file.truncate((train.tokens - moved) * self.dtype.itemsize)
        train.tokens, held_out.tokens = train.tokens - moved, moved
        return moved

    def _info(self, train: Side, held_out: Side, moved: int) -> dict[str, Any]:
        names = ["sample" if s.path == str(SAMPLE) else s.path or s.dataset for s in self.sources]
        return {
            "dtype": self.dtype.name,
            "train": {"tokens": train.tokens, "documents": train.documents},
            "held_out": {"tokens": held_out.tokens, "documents": held_out.documents, "tail_of_train": moved},
            "sources": [
                {"name": name, "weight": source.weight, "tokens": train.per_source.get(i, 0)}
                for i, (name, source) in enumerate(zip(names, self.sources, strict=True))
            ],
        }


def _take(stream: Iterator[Document], characters: int) -> list[Document]:
    """The next documents of a stream, up to about so many characters; empty at its end."""
    batch: list[Document] = []
    for document in stream:
        batch.append(document)
        characters -= len(document.text)
        if characters <= 0:
            break
    return batch


def is_held_out(key: str, seed: int, share: float) -> bool:
    """Whether a document is held out: a function of itself and the seed, so more data never moves it over."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def token_dtype(tokenizer: Any) -> np.dtype[Any]:
    """The smaller of uint16 and uint32 that holds every token id."""
    return np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)


def encode(tokenizer: Any, texts: list[str], dtype: np.dtype[Any]) -> list[np.ndarray]:
    """Token ids of each text, with EOS behind, and BOS in front if the tokenizer puts one there itself."""
    first = tokenizer("a").input_ids[:1]
    before = first if first == [tokenizer.bos_token_id] else []
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # verbose=False: a document longer than the model's context is no reason for a warning, it is cut into rows.
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    return [np.asarray([*before, *ids, *after], dtype=dtype) for ids in batch]
