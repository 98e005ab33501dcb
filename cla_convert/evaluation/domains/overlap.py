"""Which domains the training text touched, told from the tokens alone.

Two questions, two rules. *Does it hold text of this kind?* Rows are compared with rows from all over the training text
by their distributions of tokens (Bhattacharyya's coefficient, 0 to 1: function words and punctuation count as much as
topics); the similarity of a row is the mean over its three nearest. A domain counts as touched if its median row is as
near as held-out rows of the training text itself are, all but the farthest tenth of them: held-out text is what "of
this kind" means. *Does it hold this very text?* The share of the domain's runs of 16 tokens that occur in it; a domain
of which a twentieth does is touched, however few rows that are.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

RUN = 16
"""Tokens of a run that two texts share only if one of them holds a piece of the other; `_hashes` doubles up to it."""
_NEAREST = 3
_BLOCKS = 1000
"""Rows of the training text to compare with."""
_HELD_OUT = 100
_FARTHEST = 0.1
COPIED = 0.05
"""Share of a domain that may stand in the training text by chance: quotations, boilerplate."""
_CHUNK = 1 << 20
_FACTOR = 0x9E3779B97F4A7C15
_FILTER = 24
"""Bits of a hash that tell most of what is not sought."""

Tokens = NDArray[Any]


def overlap(train: Tokens, held_out: Tokens, domains: Mapping[str, Tokens]) -> dict[str, dict[str, Any]]:
    """`{name: {touched, similarity, held_out_similarity, contained}}` of rows of token ids [n, T] by domain.

    Args:
        train: the training text, tokens one after another.
        held_out: held-out text of the same sources; where it is shorter than a row, nothing is known: touched is None.
        domains: rows of one length.
    """
    length = next(iter(domains.values())).shape[1]
    blocks, known = _spread(train, length, _BLOCKS), _spread(held_out, length, _HELD_OUT)
    found = contained(train, domains)
    if not len(blocks) or not len(known):
        nothing = {"touched": None, "similarity": None, "held_out_similarity": None}
        return {name: {**nothing, "contained": share} for name, share in found.items()}
    vocabulary = np.unique(np.concatenate([known.ravel(), *(rows.ravel() for rows in domains.values())]))
    training = _roots(blocks, vocabulary)

    def nearness(rows: Tokens) -> NDArray[np.float64]:
        return np.sort(_roots(rows, vocabulary) @ training.T, axis=1)[:, -_NEAREST:].mean(axis=1)

    reference = float(np.quantile(nearness(known), _FARTHEST))
    table = {}
    for name, rows in domains.items():
        similarity = float(np.median(nearness(rows)))
        table[name] = {
            "touched": similarity >= reference or found[name] > COPIED,
            "similarity": similarity,
            "held_out_similarity": reference,
            "contained": found[name],
        }
    return table


def contained(text: Tokens, domains: Mapping[str, Tokens]) -> dict[str, float]:
    """Share of the runs of RUN tokens in each domain's rows that occur in `text`, by hashes of 64 bits.

    The text, which may hold billions of tokens, is gone through once for all domains.
    """
    sought = {name: np.concatenate([_hashes(row) for row in rows]) for name, rows in domains.items()}
    distinct = np.unique(np.concatenate([*sought.values()]))
    seen, likely = np.zeros(distinct.size, dtype=bool), np.zeros(1 << _FILTER, dtype=bool)
    likely[_first_bits(distinct)] = True
    for start in range(0, max(0, text.size - RUN + 1), _CHUNK):
        here = _hashes(text[start : start + _CHUNK + RUN - 1])
        here = here[likely[_first_bits(here)]]  # few are left to search for, which takes longest
        places = np.minimum(np.searchsorted(distinct, here), distinct.size - 1)
        seen[places[distinct[places] == here]] = True
    return {
        name: float(seen[np.searchsorted(distinct, runs)].mean()) if runs.size else 0.0 for name, runs in sought.items()
    }


def _hashes(tokens: Tokens) -> NDArray[np.uint64]:
    """A polynomial hash of every run: that of 2k tokens from those of its two halves."""
    total = tokens.astype(np.uint64) + np.uint64(1)
    for half in (1, 2, 4, 8):
        total = total[:-half] * np.uint64(pow(_FACTOR, half, 1 << 64)) + total[half:]
    return total


def _first_bits(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return hashes >> np.uint64(64 - _FILTER)


def _spread(tokens: Tokens, length: int, most: int) -> Tokens:
    """Rows from all over a text, at most so many."""
    count = tokens.size // length
    rows = tokens[: count * length].reshape(count, length)
    return np.asarray(rows[np.linspace(0, count - 1, min(count, most)).astype(int)] if count else rows, dtype=np.int64)


def _roots(rows: Tokens, vocabulary: Tokens) -> NDArray[np.float32]:
    """Square roots of the share that each token of the vocabulary has of each row [n, vocabulary]."""
    places = np.minimum(np.searchsorted(vocabulary, rows), vocabulary.size - 1)
    counts = np.zeros((len(rows), vocabulary.size), dtype=np.float32)
    for row, place, known in zip(counts, places, vocabulary[places] == rows, strict=True):
        np.add.at(row, place[known], 1)
    return np.sqrt(counts / rows.shape[1])
