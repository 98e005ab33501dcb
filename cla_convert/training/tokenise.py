"""Documents of one source, split by document into training and held-out text, and tokenised into files."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from ..documents import Document, Marked
from ..models import long_text
from ..models.long_text import ids_of, pieces, piecewise_ids

_FEW = 4096
"""Documents of which some are held out by hash, as good as surely."""
_PATIENCE = 20
"""Times the documents that fill the training side are read at most for the sake of held-out text: where many share a
key, none may ever come."""


@dataclass
class Side:
    """One side of the split of one source: a file of tokens, and where documents begin in it."""

    limit: int
    file: BinaryIO
    dtype: np.dtype[Any]
    tokens: int = 0
    starts: list[int] = field(default_factory=list)
    contents: set[int] = field(default_factory=set)
    """What is in its documents, hashed: the same text under another key, or of another source, is known by it."""

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.tokens >= self.limit

    @property
    def lacking(self) -> bool:
        """Whether tokens are wanted and there are none."""
        return self.limit > 0 and not self.tokens

    def add(self, ids: np.ndarray) -> int:
        """Append a document, or a part of one, cut where the limit is reached; returns how many tokens were taken."""
        ids = ids[: self.limit - self.tokens]
        if ids.size:
            self.starts.append(self.tokens)
            self.file.write(ids.data)  # numpy's tofile does not say that the disk is full
            self.tokens += ids.size
        return ids.size

    def clear(self) -> None:
        """Begin anew."""
        self.cut(self.tokens)
        self.contents.clear()

    def cut(self, count: int) -> np.ndarray:
        """Take the last `count` tokens away, and return them."""
        self.tokens -= count
        self.starts = [start for start in self.starts if start < self.tokens]
        self.file.seek(self.tokens * self.dtype.itemsize)
        ids = np.frombuffer(self.file.read(), self.dtype)
        self.file.seek(self.tokens * self.dtype.itemsize)
        self.file.truncate()
        return ids


@dataclass(frozen=True)
class ByShare:
    """Holds out a share of documents: a function of each and the seed, so more data never moves one over."""

    seed: int
    share: float
    seen: set[int] = field(default_factory=set)
    """The first hashes, to know the smallest of them where a source has so few documents that none is held out."""

    def holds_out(self, key: str) -> bool:
        """Whether documents of this key are held out."""
        number = hash_of(key, self.seed)
        if len(self.seen) < _FEW:
            self.seen.add(number)
        return number < self.share * 2**64

    def smallest(self) -> "BySmallest | None":
        """The split of the documents seen that holds out those with the smallest hashes; None if there is only one."""
        count = min(max(1, round(self.share * len(self.seen))), len(self.seen) - 1)
        return BySmallest(self.seed, frozenset(sorted(self.seen)[:count])) if count > 0 else None


@dataclass(frozen=True)
class BySmallest:
    """Holds out the documents of these hashes."""

    seed: int
    hashes: frozenset[int] = frozenset()

    def holds_out(self, key: str) -> bool:
        """Whether documents of this key are held out."""
        return hash_of(key, self.seed) in self.hashes


@dataclass(frozen=True)
class Splitter:
    """Splits documents by their key, and tokenises what is still needed.

    No text is on both sides, whatever its keys: the second one of two that differ in white space at most is left out.
    """

    tokenizer: Any
    split: ByShare | BySmallest
    trained: Sequence[Side] = ()
    """Training sides of the sources that were read before."""
    held: Sequence[Side] = ()
    """Their held-out sides."""
    once: bool = False
    """Take every text once."""

    def fill(
        self, batches: Iterator[list[Document]], train: Side, held_out: Side, bar: Any, *, patient: bool = True
    ) -> None:
        """Read until both sides are full (not `patient`: until the training side is), the batches end, or so much was
        read that no more held-out text is to be expected.
        """
        # Validation on a single long book would say little: a document's beginning first, the rest only if it must be.
        cap = max(64, held_out.limit // 8)
        rests: list[np.ndarray] = []
        seen = needed = 0
        for batch in batches:
            held = [self.split.holds_out(document.key) for document in batch]
            wanted = [
                (side, document)
                for side, document in zip([held_out if h else train for h in held], batch, strict=True)
                if not side.full and self._takes(side, document, train, held_out)
            ]
            most = [held_out.limit if side is held_out else train.limit - train.tokens for side, _ in wanted]
            encoded = encode(self.tokenizer, [document.content for _, document in wanted], train.dtype, most)
            for (side, _), ids in zip(wanted, encoded, strict=True):
                if side is held_out:
                    rests.append(ids[cap : held_out.limit])
                    ids = ids[:cap]
                bar.update(side.add(ids))
            seen += len(batch)
            if train.full:
                needed = needed or seen
                if held_out.full or not patient or seen > max(_FEW, _PATIENCE * needed):
                    break
        for rest in rests:
            bar.update(held_out.add(rest))

    def _takes(self, side: Side, document: Document, train: Side, held_out: Side) -> bool:
        """Whether a document may go to a side; if so, it is remembered there."""
        number = hash_of_content(document.content)
        if side is held_out:  # where a text that counts twice would only look like more
            refusing = (train, held_out, *self.trained, *self.held)
        else:
            refusing = (held_out, *self.held, *([train] if self.once else []))
        if any(number in one.contents for one in refusing):
            return False
        side.contents.add(number)
        return True


def hash_of_content(content: str | np.ndarray) -> int:
    """A number below 2^64 that stands for a text, however its words are set apart, or for token ids."""
    if not isinstance(content, str):
        return hash_of(content.tobytes().hex(), 0)
    digest = hashlib.blake2b(digest_size=8)
    before, apart = False, False  # whether there were words, and white space at the end
    for piece in pieces(content):  # all words of a book at once would take many times its size
        words = " ".join(piece.split())
        if words and before and (apart or piece[0].isspace()):
            digest.update(b" ")
        digest.update(words.encode("utf-8", "surrogatepass"))
        before, apart = before or bool(words), piece[-1].isspace()
    return int.from_bytes(digest.digest(), "big")


def hash_of(key: str, seed: int) -> int:
    """A number below 2^64 that stands for a document."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def token_dtype(tokenizer: Any) -> np.dtype[Any]:
    """The smaller of uint16 and uint32 that holds every token id."""
    return np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)


def encode(
    tokenizer: Any, contents: list[str | np.ndarray], dtype: np.dtype[Any], most: Sequence[float] = ()
) -> list[np.ndarray]:
    """Token ids of each text, with EOS behind, and in front what the tokenizer itself puts there.

    Contents that are token ids already stay as they are, and around `Marked` texts comes nothing. Of a long text, what
    comes after `most` tokens (one number a text; none: all) may be missing.
    """
    around = leading(tokenizer), [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    short = [content for content in contents if isinstance(content, str) and len(content) <= long_text.PIECE]
    encoded = iter(ids_of(tokenizer, short))

    def one(content: str | np.ndarray, most: float) -> np.ndarray:
        if not isinstance(content, str):
            return np.asarray(content, dtype=dtype)
        before, after = ([], []) if isinstance(content, Marked) else around
        if len(content) <= long_text.PIECE:
            return np.asarray([*before, *next(encoded), *after], dtype=dtype)
        parts = [np.asarray(before, dtype=dtype)]
        for some in piecewise_ids(tokenizer, content):
            parts += [np.asarray(ids, dtype=dtype) for ids in some]
            if sum(part.size for part in parts) > most:
                break
        return np.concatenate([*parts, np.asarray(after, dtype=dtype)])

    return [one(content, limit) for content, limit in zip(contents, most or [math.inf] * len(contents), strict=True)]


def leading(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts in front of a text: nothing, BOS, or more (GLM-4: `[gMASK]<sop>`, and no BOS)."""
    whole, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    return whole[: next((i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare), 0)]
