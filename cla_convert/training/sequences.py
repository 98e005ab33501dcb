"""Rows of tokens whose order is a pure function of (seed, index).

Resuming a run therefore costs one integer, and any number of processes sees the same order.
"""

from collections.abc import Sequence

import numpy as np

from ..errors import InputError


class Sequences:
    """Rows of `sequence_length` tokens from a stream, in an order that depends on (seed, index) only.

    With `starts`, the offsets in the stream where documents begin (ascending), rows also know their documents. With
    `first`, tokens, every row begins with them instead of its own first ones: models that were trained with a BOS in
    front of everything are lost without one (Gemma 3 270M: perplexity 50 instead of 21).
    """

    def __init__(
        self,
        tokens: np.ndarray,
        sequence_length: int,
        seed: int,
        *,
        starts: np.ndarray | None = None,
        first: Sequence[int] = (),
    ) -> None:
        self.count = tokens.size // sequence_length
        if not self.count:
            raise InputError(
                f"The text is too short: {tokens.size} tokens, less than one sequence of {sequence_length}",
                fix="Add text to data.sources, or lower the sequence length.",
            )
        self._rows = tokens[: self.count * sequence_length].reshape(self.count, sequence_length)
        self._starts, self._first = starts, first[:sequence_length]
        self._seed = seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def row(self, index: int) -> np.ndarray:
        """Row `index` of an endless sequence of epochs, each a new permutation: int64 [sequence_length]."""
        row = self._rows[self._place(index)].astype(np.int64)
        row[: len(self._first)] = self._first
        return row

    def rows(self, n: int, start: int = 0) -> np.ndarray:
        """Rows start .. start+n-1: int64 [n, sequence_length]."""
        return np.stack([self.row(index) for index in range(start, start + n)])

    def positions(self, n: int, start: int = 0) -> np.ndarray | None:
        """Positions of the tokens of rows start .. start+n-1, from 0 in each document: int64 [n, sequence_length].

        A document that began in an earlier row starts anew at the beginning of the row, which is all that the model
        sees of it. None without `starts`.
        """
        if self._starts is None:
            return None
        offsets = np.zeros((n, self._rows.shape[1]), dtype=np.int64)
        for row, index in zip(offsets, range(start, start + n), strict=True):
            inside = self._inside(index)
            row[inside] = inside
        return np.arange(self._rows.shape[1]) - np.maximum.accumulate(offsets, axis=1)

    def boundaries(self, n: int, start: int = 0) -> int:
        """Documents that begin inside rows start .. start+n-1, whose first token nothing predicts; 0 without starts."""
        return sum(self._inside(index).size for index in range(start, start + n))

    def _inside(self, index: int) -> np.ndarray:
        """Where documents begin in a row, its first token aside."""
        if self._starts is None:
            return np.empty(0, dtype=np.int64)
        length = self._rows.shape[1]
        first = self._place(index) * length
        low, high = np.searchsorted(self._starts, [first + 1, first + length])
        return self._starts[low:high] - first

    def _place(self, index: int) -> int:
        """Number in the stream of row `index`."""
        epoch, position = divmod(index, self.count)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self.count)
            self._epoch = epoch
        return int(self._order[position])
