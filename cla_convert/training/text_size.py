"""About how much text there is, without reading it: what a budget means in passes over it, and in a cache of tokens."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from ..amounts import human_count, passes
from ..conversations import Conversations
from ..documents import document_in, jsonl_rows, name_of, parquet_file, row_of
from ..models.long_text import ids_of
from ..recipe import Data, TextSource
from .sources import documents, local_files, sample_source

_LINES = (".jsonl", ".jsonl.gz")
_LOOKED_AT, _CHARACTERS = 8, 4_000
"""Documents of a source, and the beginning of each, that tell how long its tokens are; rows of files, and files, that
tell how much of them is text."""
_PACKED = 3
"""Times smaller that gzip makes text, about."""


def tokens_there(data: Data, tokenizer: Any, seed: int) -> int | None:
    """About how many tokens the sources hold; None where that is not known: hub datasets, sampled text."""
    sources = data.sources or [sample_source()]
    if any(source.path is None for source in sources):
        return None
    return sum(_tokens(source, tokenizer, seed) for source in sources)


def in_passes(tokens: int, there: int) -> str:
    """What a budget means: `7.5 passes over about 350k tokens of text`."""
    return f"{passes(tokens / max(there, 1))} over about {human_count(there)} tokens of text"


def _tokens(source: TextSource, tokenizer: Any, seed: int) -> int:
    texts = [str(one.content)[:_CHARACTERS] for one in islice(documents(source, seed, tokenizer), _LOOKED_AT)]
    each = sum(map(len, ids_of(tokenizer, texts))) / max(1, _length(texts))
    files = local_files(source)
    share = _share([file for file in files if file.name.lower().endswith(_LINES)][:_LOOKED_AT], source, tokenizer)
    return round(each * sum(_bytes(file, source, share) for file in files))


def _length(texts: Iterable[str]) -> int:
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


def _share(files: list[Path], source: TextSource, tokenizer: Any) -> float:
    """How much of tables of lines is text, by their first rows; the rest is markup and other columns."""
    chats = Conversations(tokenizer, name_of(source)) if source.messages_field else None
    text = read = 0
    for file in files:
        for number, (length, row) in enumerate(islice(jsonl_rows(file), _LOOKED_AT), 1):
            read += length
            text += _length(str(one.content) for one in document_in(row, source, row_of(file, number), chats))
    return text / max(1, read)


def _bytes(file: Path, source: TextSource, share: float) -> float:
    """Of the text in a file; of tables of lines it is a share."""
    name, size = file.name.lower(), file.stat().st_size
    if name.endswith(".parquet"):
        return _in_column(file, source.columns[0])
    return size * (share if name.endswith(_LINES) else 1) * (_PACKED if name.endswith(".gz") else 1)


def _in_column(file: Path, name: str) -> int:
    with parquet_file(file) as opened:
        groups = (opened.metadata.row_group(number) for number in range(opened.metadata.num_row_groups))
        columns = (group.column(number) for group in groups for number in range(group.num_columns))
        return sum(one.total_uncompressed_size for one in columns if f"{one.path_in_schema}.".startswith(f"{name}."))
