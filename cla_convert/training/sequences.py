"""Rows of tokens whose order is a pure function of (seed, index).

Resuming a run therefore costs one integer, and any number of processes sees the same order.
"""

import numpy as np

from ..errors import InputError


class Sequences:
    """Rows of `sequence_length` tokens from a stream, in an order that depends on (seed, index) only."""

    def __init__(self, tokens: np.ndarray, sequence_length: int, seed: int) -> None:
        self.count = tokens.size // sequence_length
        if not self.count:
            raise InputError(
                f"The text is too short: {tokens.size} tokens, less than one sequence of {sequence_length}",
                fix="Add text to data.sources, or lower the sequence length.",
            )
        self._rows = tokens[: self.count * sequence_length].reshape(self.count, sequence_length)
        self._seed = seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def row(self, index: int) -> np.ndarray:
        """Row `index` of an endless sequence of epochs, each a new permutation: int64 [sequence_length]."""
        epoch, position = divmod(index, self.count)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self.count)
            self._epoch = epoch
        return self._rows[self._order[position]].astype(np.int64)

    def rows(self, n: int, start: int = 0) -> np.ndarray:
        """Rows start .. start+n-1: int64 [n, sequence_length]."""
        return np.stack([self.row(index) for index in range(start, start + n)])
