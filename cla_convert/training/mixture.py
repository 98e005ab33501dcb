"""Several sources in the proportions of their weights, counted in tokens, exactly.

Every source is read once, up to its share of the tokens wanted. One that holds less than its share is repeated, so that
the weights hold whatever the sizes; if all hold less, the whole is as long as the largest makes it and `Sequences` goes
round again. Held-out text is never repeated.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from ..amounts import times
from ..console import human_count, progress, say, warn
from ..documents import Document, name_of
from ..errors import InputError
from ..recipe import TextSource
from .sampling import SourceModel, about_samples, sampled
from .sources import SUFFIXES, documents, in_batches, passed_over
from .tokenise import ByShare, BySmallest, Side, Splitter, token_dtype


@dataclass(frozen=True)
class Part:
    """What was read of one source."""

    source: TextSource
    train: Side
    held_out: Side
    tail: int = 0
    """Held-out tokens that are the end of the training text, for want of documents."""

    @property
    def one_sided(self) -> bool:
        """Whether all of it fell on one side, and something is wanted of both."""
        return self.train.lacking != self.held_out.lacking


@dataclass(frozen=True)
class Mixture:
    """Sources, and how much of them is wanted."""

    sources: list[TextSource]
    tokens: int
    held_out_tokens: int
    share: float
    """Share of documents that is held out."""
    tokenizer: Any
    seed: int
    model: SourceModel | None = None
    """What sources with `generate` sample from."""

    def build(self, folder: Path) -> dict[str, Any]:
        """Write train.bin, starts.bin (offsets of documents in it, int64) and held_out.bin; returns the info.

        Raises:
            InputError: a source cannot be read or holds no text.
        """
        weights = [source.weight for source in self.sources]
        limits = [*zip(shares(self.tokens, weights), shares(self.held_out_tokens, weights), strict=True)]
        # What is sampled last: that takes minutes, and a bad row of a file is to be told before them.
        order = sorted(range(len(self.sources)), key=lambda number: self.sources[number].generate is not None)
        with progress(self.tokens + self.held_out_tokens, "tokenising", unit="tok") as bar:
            read: dict[int, Part] = {}
            for n in order:
                read[n] = self._read(self.sources[n], *limits[n], folder / f"{n}", bar, [*read.values()])
        parts = [read[n] for n in sorted(read)]
        targets = balanced([part.train.tokens for part in parts], [part.train.limit for part in parts])
        starts = _join([part.train for part in parts], targets, folder / "train.bin")
        (folder / "starts.bin").write_bytes(starts.data)
        held_out = [part.held_out for part in parts]
        _join(held_out, [side.tokens for side in held_out], folder / "held_out.bin")
        for side in [*(part.train for part in parts), *held_out]:
            Path(side.file.name).unlink()
        info = _info(parts, targets, [self._about(source) for source in self.sources])
        return info | {"conversations": self._conversations(targets)}

    def _conversations(self, targets: Sequence[int]) -> float | None:
        """The share of the training tokens that are conversations; None where the model has no chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        chats = sum(share_of_chats(source) * target for source, target in zip(self.sources, targets, strict=True))
        return chats / max(1, sum(targets))

    def _read(
        self, source: TextSource, tokens: int, held_out_tokens: int, path: Path, bar: Any, before: Sequence[Part]
    ) -> Part:
        """Read a source up to its share. Text that was read `before` stays on the side on which it is.

        Where it has so few documents that all fall on one side, those with the smallest hashes are held out; of a
        single document, however often it is repeated, its end is.
        """
        dtype = token_dtype(self.tokenizer)
        with Path(f"{path}.train").open("w+b") as file, Path(f"{path}.held_out").open("w+b") as other:
            part = Part(source, Side(tokens, file, dtype), Side(held_out_tokens, other, dtype))
            split = ByShare(self.seed, self.share)
            self._fill(part, split, bar, before)
            if part.one_sided and (smallest := split.smallest()):
                self._fill(part, smallest, bar, before)
            if part.one_sided:
                part = self._split_at_its_end(part, bar, before)
            if part.train.lacking:
                raise InputError(
                    f"The data source {name_of(source)!r} holds no text to train on",
                    f"Every document is empty{', or held out by another source' if before else ''}.",
                    f"Check data.sources and text_field{'; name a text once' if before else ''}.",
                )
        return part

    def _fill(
        self, part: Part, split: ByShare | BySmallest, bar: Any, before: Sequence[Part], *, once: bool = False
    ) -> None:
        source, train, held_out = part.source, part.train, part.held_out
        train.clear()
        held_out.clear()
        # Nothing is sampled for the sake of held-out text alone.
        batches = self._open(source, lambda: ceil((train.limit - train.tokens) / (1 - self.share)))
        trained, held = [one.train for one in before], [one.held_out for one in before]
        splitter = Splitter(self.tokenizer, split, trained, held, once)
        splitter.fill(batches, train, held_out, bar, patient=source.generate is None)

    def _split_at_its_end(self, part: Part, bar: Any, before: Sequence[Part]) -> Part:
        """Hold out the last tokens of a source of one document, read as far as both sides want; nothing of one that
        another source trains on.
        """
        train, held_out = part.train, part.held_out
        wanted = train.limit
        train.limit += held_out.limit
        self._fill(part, BySmallest(self.seed), bar, before, once=True)
        train.limit = wanted
        tail = 0
        if all(train.contents.isdisjoint(one.train.contents) for one in before):
            ids = train.cut(min(held_out.limit, max(int(train.tokens * self.share), train.tokens - wanted)))
            tail = held_out.add(ids)
            held_out.contents |= train.contents  # nobody remembers where it was cut
        train.cut(max(0, train.tokens - wanted))
        if tail:
            last = "token is" if tail == 1 else f"{tail} tokens are"
            warn(
                f"{name_of(part.source)} is a single document: its last {last} held out. More documents give a cleaner "
                "split."
            )
        return replace(part, tail=tail)

    def _open(self, source: TextSource, wanted: Callable[[], int]) -> Iterator[list[Document]]:
        if source.generate is None:
            return in_batches(documents(source, self.seed, self.tokenizer))
        assert self.model is not None, "a source with `generate` needs the source model"
        return sampled(self.model, self.tokenizer, source.generate, self.seed, wanted)

    def _about(self, source: TextSource) -> dict[str, Any]:
        """What is known of a source beyond its name and weight; says which files of it are not read."""
        if source.generate is None:
            return {"revision": source.revision, "passed_over": _passed_over(source)}
        assert self.model is not None
        return {"sampled": about_samples(self.model, self.tokenizer, source.generate, self.seed)}


def _passed_over(source: TextSource) -> dict[str, int]:
    """How many files of the source are not read, by ending; says so: a corpus read in part looks like a whole one."""
    if unread := passed_over(source):
        said = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in unread.items())
        warn(f"{name_of(source)}: files that are not read: {said}. Supported: {', '.join(SUFFIXES)}")
    return unread


def share_of_chats(source: TextSource) -> float:
    """How much of a source is conversations in the model's chat template: all, nothing, or some kinds of start."""
    if source.generate:
        return source.generate.starts.count("chat") / len(source.generate.starts)
    return float(source.messages_field is not None)


def shares(total: int, weights: list[float]) -> list[int]:
    """`total` divided in proportion to the weights: whole numbers that add up to it."""
    ends = [round(total * part / sum(weights)) for part in accumulate(weights)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def balanced(held: list[int], wanted: list[int]) -> list[int]:
    """Tokens to take of each source, in the proportions wanted.

    All that is wanted if one source at least has its share; otherwise so much that the source that comes closest is
    taken exactly once. The others are repeated.
    """
    best = max(range(len(wanted)), key=lambda i: held[i] / wanted[i] if wanted[i] else 0.0)
    return [want * held[best] // wanted[best] for want in wanted] if wanted[best] else [0 for _ in wanted]


def _join(sides: list[Side], targets: list[int], out: Path) -> np.ndarray:
    """Write `targets[i]` tokens of each side into one file, going round where a side has fewer; returns the starts."""
    starts, end = [np.empty(0, dtype=np.int64)], 0
    with out.open("wb") as file:
        for side, left in zip(sides, targets, strict=True):
            while left:
                tokens = np.memmap(side.file.name, dtype=side.dtype, mode="r")[:left]
                file.write(tokens.data)
                begins = np.asarray(side.starts, dtype=np.int64)
                starts.append(end + begins[begins < tokens.size])
                end, left = end + tokens.size, left - tokens.size
    return np.concatenate(starts)


def _info(parts: list[Part], targets: list[int], about: list[dict[str, Any]]) -> dict[str, Any]:
    """Documents and tokens, in all and per source; says which sources are repeated."""
    sources = []
    for part, target, known in zip(parts, targets, about, strict=True):
        passes = target / part.train.tokens if part.train.tokens else 0.0
        if passes > 1:
            say(
                f"{name_of(part.source)} holds {human_count(part.train.tokens)} training tokens for its share of "
                f"{human_count(target)}: it is repeated, {times(passes)} passes."
            )
        known = {"name": name_of(part.source), "weight": part.source.weight, **known}
        sources.append(known | {"tokens": target, "documents": len(part.train.starts), "passes": round(passes, 3)})
    held_out = [part.held_out for part in parts]
    return {
        "dtype": parts[0].train.dtype.name,
        "train": {"tokens": sum(targets), "documents": sum(source["documents"] for source in sources)},
        "held_out": {
            "tokens": sum(side.tokens for side in held_out),
            "documents": sum(len(side.starts) for side in held_out),
            "tail_of_train": sum(part.tail for part in parts),
        },
        "sources": sources,
    }
