"""Text files and tables of the user's: what is in them, and their tokens as rows. None is ever in memory as a whole."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from ..documents import TABLES, Document, documents_of
from ..errors import InputError
from ..files import path_of
from ..models.long_text import ids_of, piecewise_ids
from ..recipe import TextFile, TextSource
from ..refusals import refusal, unread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHOLE = 2**22
"""Characters of a text that is tokenised as a whole, which takes half a gigabyte. A longer one is tokenised in pieces,
where tokenizers that do not cut text at spaces can see other tokens at a cut: once in 65,536 characters."""


@dataclass(frozen=True)
class Content:
    """What is read of a text file."""

    sha256: str
    """Of its characters in UTF-8."""
    characters: int
    bytes: int

    @property
    def identity(self) -> list[Any]:
        """What its tokens depend on beside the tokenizer."""
        return [self.sha256, *(["in pieces"] if self.characters > WHOLE else [])]


def content_of(text: TextFile) -> Content:
    """Read a text file through. Raises InputError if it cannot be read or is empty."""
    digest, characters, size, blank = hashlib.sha256(), 0, 0, True
    for block in _blocks(text):
        encoded = block.encode()
        digest.update(encoded)
        characters, size, blank = characters + len(block), size + len(encoded), blank and not block.strip()
    if blank:
        raise InputError(f"eval.perplexity {text.name}: {path_of(text.path)} is empty")
    return Content(digest.hexdigest(), characters, size)


def windows(text: TextFile, tokenizer: "PreTrainedTokenizerBase", at_once: int) -> Iterator[torch.Tensor]:
    """All of a text as rows [n, 1 + window] of token ids, at most `at_once` at a time, and last a shorter one.

    Each begins with the tokenizer's BOS (EOS where it has none), as in lm-eval, so that every token is predicted once.
    """
    prefix: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for part in _parts(_ids(text, tokenizer), text.window, at_once):
        yield torch.cat((torch.full((len(part), 1), prefix), part), dim=1)


def beginning(
    text: TextFile, tokenizer: "PreTrainedTokenizerBase", tokens: int, first: Sequence[int] = ()
) -> torch.Tensor | None:
    """So many tokens of a text, from its start, as whole rows [n, window], or one shorter row; None: there are not two.

    `first` as for `packed`.
    """
    length = min(text.window, tokens)
    ids = torch.tensor(_first_ids(text, tokenizer, tokens // length * length), dtype=torch.long)
    return packed(ids, min(length, len(ids)), first) if len(ids) > 1 else None


def _first_ids(text: TextFile, tokenizer: "PreTrainedTokenizerBase", wanted: int) -> list[int]:
    """The first so many ids of a text, or all if it has no more, from not much more of it than they take.

    Where a text is cut its last tokens are others than of the whole, so some more are asked for.
    """
    characters = _LETTERS * (wanted + _SPARE)
    while True:
        most = characters if text.characters is None else min(characters, text.characters)
        part = text.model_copy(update={"characters": most})
        ids = [one for some in _ids(part, tokenizer) for one in some]
        if len(ids) >= wanted + _SPARE or sum(map(len, _blocks(part))) < characters:
            return ids[:wanted]
        characters *= 4


_LETTERS, _SPARE = 8, 64
"""Characters for a token, to begin with; tokens at a cut that do not count."""


def packed(ids: torch.Tensor, length: int, first: Sequence[int]) -> torch.Tensor:
    """Token ids [N] as rows [n, length] one after the other; what is left at the end is no row.

    Every row begins with `first` in place of its own first tokens: what the tokenizer puts in front of a text.
    """
    rows = ids[: len(ids) // length * length].view(-1, length).clone()
    rows[:, : len(first)] = torch.tensor(first[:length], dtype=ids.dtype)
    return rows


def _parts(ids: Iterable[list[int]], window: int, at_once: int) -> Iterator[torch.Tensor]:
    """Full windows [n, window], at most `at_once` of them, and what is left [1, rest]."""
    rest, size = torch.empty(0, dtype=torch.long), window * at_once
    for some in ids:
        rest = torch.cat((rest, torch.tensor(some, dtype=torch.long)))
        whole = len(rest) // size * size
        yield from rest[:whole].view(-1, window).split(at_once) if whole else ()
        rest = rest[whole:]
    whole = len(rest) // window * window
    yield from (part for part in (rest[:whole].view(-1, window), rest[whole:].view(1, -1)) if part.numel())


def _ids(text: TextFile, tokenizer: "PreTrainedTokenizerBase") -> Iterator[list[int]]:
    """Token ids, all at once of a text of `WHOLE` characters at most."""
    blocks = _blocks(text)
    begin, more = next(blocks, ""), next(blocks, "")
    if not more:
        yield from ids_of(tokenizer, [begin])
        return
    for some in piecewise_ids(tokenizer, chain((begin, more), blocks)):
        yield from some


def _blocks(text: TextFile) -> Iterator[str]:
    """What is to be read of a file, `WHOLE` characters at a time. Raises InputError."""
    path, left = path_of(text.path), text.characters
    try:
        with _opened(path, text) as file:
            while block := file.read(WHOLE if left is None else min(WHOLE, left)):
                yield block
                left = None if left is None else left - len(block)
    except (OSError, UnicodeDecodeError) as error:
        why = refusal(error).why if isinstance(error, OSError) else ""
        raise unread(error, InputError(f"eval.perplexity {text.name}: {path} cannot be read", why)) from error


def _opened(path: Path, text: TextFile) -> "TextIO | _Rows":
    """What to read a text from; of a table, the texts of its rows as one."""
    if not path.name.lower().endswith(TABLES):
        return path.open(encoding="utf-8", newline="")
    return _Rows(documents_of(path, TextSource(path=str(path), text_field=text.text_field)))


class _Rows:
    """The texts of rows, with a blank line between two, to be read like a file."""

    def __init__(self, rows: Iterator[Document]) -> None:
        self._texts = (f"\n\n{row.content}" if number else str(row.content) for number, row in enumerate(rows))
        self._rest = ""

    def read(self, characters: int) -> str:
        """The next characters; fewer at the end only. No more is in memory than these and a row."""
        parts, length = [self._rest], len(self._rest)
        while length < characters and (more := next(self._texts, "")):
            parts.append(more)
            length += len(more)
        whole = "".join(parts)
        self._rest = whole[characters:]
        return whole[:characters]

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *error: object) -> None:
        self._texts.close()
