"""Documents from text files, tables and hub datasets, one at a time and in an order that the seed fixes."""

import glob
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ..console import say_once
from ..conversations import Conversations
from ..documents import SAMPLE, TABLES, Document, document_in, documents_of, name_of
from ..environment import cache_of
from ..errors import ClaError, InputError, UsageError, did_you_mean
from ..files import looked_in, path_of, write_bytes
from ..recipe import TextSource

SUFFIXES = (".txt", ".md", *TABLES)
BATCH_CHARACTERS = 65_536
"""Text tokenised at a time: enough to keep a fast tokenizer busy."""


def sample_source() -> TextSource:
    """The public-domain and openly licensed text shipped with the package (cla_convert/data/README.md)."""
    return TextSource(path=str(SAMPLE), document_field="document")


def pinned(source: TextSource) -> TextSource:
    """The source with the branch or tag of its hub dataset resolved to a commit: what is cached is what was asked for.

    Without a network it is the commit seen last, so that text tokenised earlier is found again.

    Raises:
        InputError: it is not there, or the hub cannot be asked.
        UsageError: a revision is asked for of a folder that is here.
    """
    if source.revision and is_local(source):
        raise UsageError(
            f"Revisions are of datasets of the hub, and {source.dataset} is here",
            why=f"{source.revision!r} was asked for; what lies in the folder would be taken, whichever it is.",
            fix="Leave `revision` of this source (data.sources) out, or name a hub id.",
        )
    if source.dataset is None or is_local(source):
        return source
    return source.model_copy(update={"revision": _commit(source.dataset, source.revision or "main")})


@cache
def _commit(dataset: str, revision: str) -> str:
    """Asked for once in a process: every stage of a run reads the same, also where the dataset moves on meanwhile."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    note = cache_of("datasets") / f"{dataset}@{revision}".replace("/", "--")
    try:
        commit = str(HfApi().dataset_info(dataset, revision=revision, expand=["sha"]).sha)
    except Exception as error:  # of the HTTP library that huggingface_hub happens to use, or its own
        if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)) or not note.exists():
            raise _unreadable(dataset, error) from error
        commit = note.read_text()
        say_once(f"the hub cannot be asked about {dataset!r}: taking commit {commit[:12]}, seen last")
    else:
        write_bytes(note, commit.encode())
    return commit


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
        yield from documents_of(file, source, chats)


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
    path = path_of(source.path)
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
    path = path_of(source.path)
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
    said = f"There is no such file or folder.{did_you_mean(path.name, siblings)}"
    return f"{said} {looked_in(path)}".rstrip()


def _dataset(source: TextSource, chats: Conversations | None) -> Iterator[Document]:
    import datasets

    revision = None if is_local(source) else source.revision
    try:
        rows = datasets.load_dataset(
            str(source.dataset), source.config, split=source.split, revision=revision, streaming=True
        )
        for number, row in enumerate(rows, 1):
            yield from document_in(row, source, f"row {number} of the dataset {source.dataset!r}", chats)
    except ClaError:
        raise
    except Exception as error:  # the library raises whatever its many back ends raise
        raise _unreadable(source.dataset, error) from error


def _unreadable(dataset: str | None, error: Exception) -> InputError:
    return InputError(
        f"Cannot read the dataset {dataset!r}",
        f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}",
        "Check its name, config, split and revision, the network and HF_HUB_OFFLINE; a private or gated dataset needs "
        "HF_TOKEN and its terms accepted. Or name local files with `path`.",
    )
