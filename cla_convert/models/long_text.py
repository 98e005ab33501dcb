"""Long texts become tokens a piece at a time: of a text, a tokenizer keeps more than a hundred bytes a character."""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

PIECE = 65_536
"""Characters that a tokenizer is given at once."""
AT_ONCE = 16
"""Pieces of one text that are tokenised together, on several threads."""
_WORD = 1024
"""Characters at the end of a piece in which a place to cut is looked for."""
_BETWEEN = re.compile(r"\w\s(?=\S)")


def pieces(text: str | Iterable[str]) -> Iterator[str]:
    """A text, given whole or in blocks of any length, in parts of at most `PIECE` characters.

    Each but the first begins with the white space before a word. There most tokenizers begin a token anyway. Where
    there is no such place, a part ends in the middle of a word.
    """
    rest = ""
    for block in [text] if isinstance(text, str) else text:
        rest, start = rest + block if rest else block, 0
        while len(rest) - start > PIECE:
            latest = rest[start + PIECE - _WORD : start + PIECE + 1]
            found = [match.end() - 1 for match in _BETWEEN.finditer(latest)]
            end = start + PIECE - _WORD + found[-1] if found else start + PIECE
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def piecewise_ids(tokenizer: Any, text: str | Iterable[str]) -> Iterator[list[list[int]]]:
    """Token ids of the pieces of a text, `AT_ONCE` pieces at a time, with nothing put around them."""
    rest = pieces(text)
    while some := list(islice(rest, AT_ONCE)):
        yield ids_of(tokenizer, some)


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with nothing put around them."""
    # verbose=False: a text longer than the model's context is no reason for a warning, it is cut into rows.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, **options).input_ids if texts else []
