"""Documents of one file: plain text, or the rows of a table. Training and evaluation read tables alike."""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .conversations import Conversations
from .errors import InputError, did_you_mean
from .recipe import TextSource
from .refusals import unread
from .surrogates import replaced

SAMPLE = Path(__file__).parent / "data" / "sample.parquet"
TABLES = (".jsonl", ".jsonl.gz", ".parquet")
"""Endings of files whose rows are documents."""
_NAME = "Name the column of text with `text_field` (in data.sources, one of conversations with `messages_field`)."


class Marked(str):
    """A text that has its marks already, as a chat template sets them: nothing is put in front of it or behind."""


class Document(NamedTuple):
    """A text, or the token ids of one [n], and the key that decides on which side of the held-out split it falls."""

    content: str | np.ndarray
    key: str


def name_of(source: TextSource) -> str:
    """What to call a source in notes and reports."""
    if source.generate:
        return "sampled from the source model"
    return "sample" if source.path == str(SAMPLE) else str(source.path or source.dataset)


def documents_of(path: Path, source: TextSource, chats: Conversations | None = None) -> Iterator[Document]:
    """Every non-empty document of a file, told apart by its ending; `chats` reads `messages_field`.

    Raises InputError where it cannot be read.
    """
    if path.name.lower().endswith((".txt", ".md")):
        if chats:
            raise InputError(
                f"{str(path)!r} has no column {source.messages_field!r}",
                "Conversations are rows of .jsonl or .parquet files, or of a dataset.",
                "Leave `messages_field` out, or name other files.",
            )
        with _readable(path):
            text = path.read_text(encoding="utf-8-sig")
        if not text.isspace() and text:
            yield Document(text, text)
        return
    rows = _parquet(path, source) if path.suffix.lower() == ".parquet" else (row for _, row in jsonl_rows(path))
    for number, row in enumerate(rows, 1):
        yield from document_in(row, source, row_of(path, number), chats)


def row_of(path: Path, number: int) -> str:
    """What notes and errors call a row of a file, the first of which is 1."""
    return f"row {number} of {str(path)!r}"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (UnicodeDecodeError, OSError, EOFError) as error:
        damaged = InputError(f"Cannot read {str(path)!r}", str(error), "Mend the file, or leave it out.")
        raise unread(error, damaged) from error


def jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a .jsonl file, packed or not, each after the bytes of its line. Raises InputError."""
    with (
        _readable(path),
        gzip.open(path, "rt", encoding="utf-8-sig")
        if path.suffix.lower() == ".gz"
        else path.open(encoding="utf-8-sig") as lines,
    ):
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield len(line.encode()), json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"Line {number} of {str(path)!r} is not JSON", str(error), "One JSON object a line."
                ) from error


def _parquet(path: Path, source: TextSource) -> Iterator[dict[str, Any]]:
    with parquet_file(path) as file:
        _require(source.columns, file.schema_arrow.names, str(path))
        for batch in file.iter_batches(batch_size=256, columns=source.columns):
            yield from batch.to_pylist()


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """An open pyarrow.parquet.ParquetFile. Raises InputError for what is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _readable(path), pq.ParquetFile(path) as file:
            yield file
    except pa.ArrowException as error:
        raise InputError(f"{str(path)!r} is not a parquet file that can be read", str(error)) from error


def document_in(row: Any, source: TextSource, where: str, chats: Conversations | None = None) -> Iterator[Document]:
    """The document in a row, or nothing where the text is empty, or no conversation for the template."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is not an object with columns", f"It is a {type(row).__name__}.")
    _require(source.columns, list(row), where)
    work = row[source.document_field] if source.document_field else None  # a row of no work is one by itself
    if chats:
        turns = row[str(source.messages_field)]
        if text := "" if turns is None else chats.text(turns, where):
            yield Document(Marked(text), text if work is None else str(work))
        return
    text = row[source.text_field]
    if text is not None and not isinstance(text, str):
        raise InputError(
            f"{source.text_field!r} in {where} is not text",
            f"It holds a {type(text).__name__}.",
            _NAME,
        )
    if text and not text.isspace():
        text = replaced(text, f"text of {name_of(source)}")
        yield Document(text, text if work is None else str(work))


def _require(wanted: list[str], present: list[str], where: str) -> None:
    for name in wanted:
        if name not in present:
            raise InputError(
                f"There is no column {name!r} in {where}",
                f"It has {', '.join(map(repr, present)) or 'none'}.{did_you_mean(name, present)}",
                _NAME,
            )
