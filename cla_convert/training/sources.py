"""Documents from text files, tables and hub datasets, one at a time and in an order that the seed fixes."""

import glob
import gzip
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..console import say
from ..environment import cache_of
from ..errors import ClaError, InputError, did_you_mean
from ..files import write_bytes
from ..recipe import TextSource
from ..refusals import unread
from ..surrogates import replaced
from .conversations import Conversations

SAMPLE = Path(__file__).parent.parent / "data" / "sample.parquet"
SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")
BATCH_CHARACTERS = 65_536
"""Text tokenised at a time: enough to keep a fast tokenizer busy."""


class Document(NamedTuple):
    """A text, or the token ids of one [n], and the key that decides on which side of the held-out split it falls."""

    content: str | np.ndarray
    key: str


def sample_source() -> TextSource:
    """The public-domain and openly licensed text shipped with the package (cla_convert/data/README.md)."""
    return TextSource(path=str(SAMPLE), document_field="document")


def name_of(source: TextSource) -> str:
    """What to call a source in notes and reports."""
    if source.generate:
        return "sampled from the source model"
    return "sample" if source.path == str(SAMPLE) else str(source.path or source.dataset)


def pinned(source: TextSource) -> TextSource:
    """The source with the branch or tag of its hub dataset resolved to a commit: what is cached is what was asked for.

    Without a network it is the commit seen last, so that text tokenised earlier is found again. Raises InputError.
    """
    if source.dataset is None or is_local(source):
        return source
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    revision = source.revision or "main"
    note = cache_of("datasets") / f"{source.dataset}@{revision}".replace("/", "--")
    try:
        commit = str(HfApi().dataset_info(source.dataset, revision=revision, expand=["sha"]).sha)
    except Exception as error:  # of the HTTP library that huggingface_hub happens to use, or its own
        if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)) or not note.exists():
            raise _unreadable(source, error) from error
        commit = note.read_text()
        say(f"the hub cannot be asked about {source.dataset!r}: taking commit {commit[:12]}, seen last")
    else:
        write_bytes(note, commit.encode())
    return source.model_copy(update={"revision": commit})


def is_local(source: TextSource) -> bool:
    """Whether `dataset` names a folder, which `datasets.load_dataset` then prefers to the hub."""
    return source.dataset is not None and Path(source.dataset).is_dir()


def documents(source: TextSource, seed: int, tokenizer: Any = None) -> Iterator[Document]:
    """Every non-empty document of files or a dataset, once; conversations by the chat template of the tokenizer.

    Raises InputError where the source cannot be read.
    """
    chats = Conversations(tokenizer, name_of(source)) if source.messages_field else None
    if source.dataset is not None:
        yield from _dataset(source, chats)
        return
    files = local_files(source)
    # A budget smaller than the folder should not mean "only what sorts first".
    random.Random(seed).shuffle(files)
    for file in files:
        yield from _file(file, source, chats)


def in_batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    """A stream of documents, some of them at a time."""
    batch: list[Document] = []
    characters = 0
    for document in stream:
        batch.append(document)
        characters += len(document.content)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def local_files(source: TextSource) -> list[Path]:
    """The files behind a source (a file, a folder at any depth, or a glob), sorted. Raises InputError."""
    if is_local(source):
        return sorted(file for file in Path(str(source.dataset)).rglob("*") if file.is_file())
    assert source.path is not None
    path = Path(source.path).expanduser()
    if path.is_file():
        if not _is_text(path):
            raise InputError(
                f"Cannot read text from {str(path)!r}", "The kind of a file is told by its ending.", _SUPPORTED
            )
        return [path]
    files = sorted(file for file in _all_files(path) if _is_text(file))
    if not files:
        raise InputError(f"No text files at {source.path!r}", _why_nothing(path), _SUPPORTED)
    return files


def passed_over(source: TextSource) -> dict[str, int]:
    """How many files of a source's folder or glob are not read, by their endings; hidden ones do not count."""
    if source.path is None:
        return {}
    path = Path(source.path).expanduser()
    unread = (file for file in _all_files(path) if not file.name.startswith(".") and not _is_text(file))
    return dict(Counter(file.suffix for file in unread).most_common())


def _all_files(path: Path) -> Iterator[Path]:
    """The files in a folder at any depth, none of them hidden or in a hidden folder, or those that a glob matches."""
    if path.is_dir():
        found = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
    else:
        found = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207  (absolute too)
    return (file for file in found if file.is_file())


def _is_text(file: Path) -> bool:
    return file.name.lower().endswith(SUFFIXES)


_SUPPORTED = f"Supported: {', '.join(SUFFIXES)}; a file, a folder or a glob such as 'corpus/*.parquet'."


def _why_nothing(path: Path) -> str:
    if path.is_dir():
        return "The folder holds no file with a supported ending."
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"There is no such file or folder.{did_you_mean(path.name, siblings)}"


def _file(path: Path, source: TextSource, chats: Conversations | None) -> Iterator[Document]:
    try:
        if path.name.lower().endswith((".txt", ".md")):
            if chats:
                raise InputError(
                    f"{str(path)!r} has no column {source.messages_field!r}",
                    "Conversations are rows of .jsonl or .parquet files, or of a dataset.",
                    "Leave `messages_field` out, or name other files.",
                )
            text = path.read_text(encoding="utf-8-sig")
            if not text.isspace() and text:
                yield Document(text, text)
            return
        rows = _parquet(path, source) if path.suffix.lower() == ".parquet" else _jsonl(path)
        for number, row in enumerate(rows, 1):
            yield from _document(row, source, f"row {number} of {str(path)!r}", chats)
    except (UnicodeDecodeError, OSError, EOFError) as error:
        damaged = InputError(f"Cannot read {str(path)!r}", str(error), "Mend the file, or leave it out.")
        raise unread(error, damaged) from error


def _jsonl(path: Path) -> Iterator[Any]:
    with (
        gzip.open(path, "rt", encoding="utf-8-sig")
        if path.suffix.lower() == ".gz"
        else path.open(encoding="utf-8-sig") as lines
    ):
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"Line {number} of {str(path)!r} is not JSON", str(error), "One JSON object a line."
                ) from error


def _parquet(path: Path, source: TextSource) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _require(source.columns, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=256, columns=source.columns):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"{str(path)!r} is not a parquet file that can be read", str(error)) from error


def _dataset(source: TextSource, chats: Conversations | None) -> Iterator[Document]:
    import datasets

    revision = None if is_local(source) else source.revision
    try:
        rows = datasets.load_dataset(
            str(source.dataset), source.config, split=source.split, revision=revision, streaming=True
        )
        for number, row in enumerate(rows, 1):
            yield from _document(row, source, f"row {number} of the dataset {source.dataset!r}", chats)
    except ClaError:
        raise
    except Exception as error:  # the library raises whatever its many back ends raise
        raise _unreadable(source, error) from error


def _unreadable(source: TextSource, error: Exception) -> InputError:
    return InputError(
        f"Cannot read the dataset {source.dataset!r}",
        f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}",
        "Check its name, config, split and revision, the network and HF_HUB_OFFLINE; a private or gated dataset needs "
        "HF_TOKEN and its terms accepted. Or name local files with `path`.",
    )


def _document(row: Any, source: TextSource, where: str, chats: Conversations | None) -> Iterator[Document]:
    """The document in a row, or nothing where the text is empty, or no conversation for the template."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is not an object with columns", f"It is a {type(row).__name__}.")
    _require(source.columns, list(row), where)
    work = row[source.document_field] if source.document_field else None  # a row of no work is one by itself
    if chats:
        if text := chats.text(row[str(source.messages_field)], where):
            yield Document(chats.ids(text), text if work is None else str(work))
        return
    text = row[source.text_field]
    if text is not None and not isinstance(text, str):
        raise InputError(
            f"{source.text_field!r} in {where} is not text",
            f"It holds a {type(text).__name__}.",
            "Name the column of text with `text_field`, one of conversations with `messages_field`.",
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
                "Name the column of text with `text_field`, one of conversations with `messages_field`.",
            )
