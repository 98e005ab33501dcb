"""About how much text there is, without reading it: what a budget means in passes over it, and in a cache of tokens."""

from itertools import islice
from pathlib import Path
from typing import Any

from ..console import human_count
from ..models.long_text import ids_of
from ..recipe import Recipe, TextSource
from .sources import documents, local_files, sample_source

_LOOKED_AT, _CHARACTERS = 8, 4_000
"""Documents of a source, and the beginning of each, that tell how long its tokens are."""
_PACKED = 3
"""Times smaller that gzip makes text, about."""


def tokens_there(recipe: Recipe, tokenizer: Any) -> int | None:
    """About how many tokens the sources hold; None where that is not known: hub datasets, sampled text."""
    sources = recipe.data.sources or [sample_source()]
    if any(source.path is None for source in sources):
        return None
    return sum(_tokens(source, tokenizer, recipe.seed) for source in sources)


def in_passes(tokens: int, there: int) -> str:
    """What a budget means: `7.5 passes over about 350k tokens of text`."""
    return f"{tokens / max(there, 1):.2g} passes over about {human_count(there)} tokens of text"


def _tokens(source: TextSource, tokenizer: Any, seed: int) -> int:
    texts = [str(one.content)[:_CHARACTERS] for one in islice(documents(source, seed, tokenizer), _LOOKED_AT)]
    read = sum(len(text.encode()) for text in texts)
    each = sum(map(len, ids_of(tokenizer, texts))) / read if read else 0
    return round(each * sum(_bytes(file, source) for file in local_files(source)))


def _bytes(file: Path, source: TextSource) -> int:
    """Of the text in a file."""
    if file.suffix.lower() == ".parquet":
        return _in_column(file, source.columns[0])
    return file.stat().st_size * (_PACKED if file.suffix.lower() == ".gz" else 1)


def _in_column(file: Path, name: str) -> int:
    import pyarrow.parquet as pq

    about = pq.read_metadata(file)
    groups = (about.row_group(number) for number in range(about.num_row_groups))
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] == name)
