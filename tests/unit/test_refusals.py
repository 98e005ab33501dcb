"""A file that may not be read is not called damaged, whoever reads it; nor is one of another encoding."""

import builtins
import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cla_convert.cli import main
from cla_convert.errors import ClaError, InputError
from cla_convert.evaluation.local_rows import local_splits
from cla_convert.evaluation.texts import check_texts
from cla_convert.files import check_place, load_json
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import load_tokenizer
from cla_convert.models.pickles import read_pickles
from cla_convert.recipe import TextFile, TextSource
from cla_convert.recipe_file import load_recipe
from cla_convert.training.sources import documents
from tests.conftest import save_tiny_llama

READERS: dict[str, Callable[[Path], object]] = {
    "config.json": load_json,
    "model.safetensors": lambda path: Checkpoint.open(path.parent),
    "tokenizer.json": lambda path: load_tokenizer(path.parent),
    "pytorch_model.bin": lambda path: read_pickles([path]),
    "mine.yaml": load_recipe,
    "corpus.txt": lambda path: list(documents(TextSource(path=str(path)), 0)),
    "text.txt": lambda path: check_texts([TextFile(name="text", path=str(path))]),
    "tasks/test.jsonl": lambda path: local_splits(path.parent),
}
ENCODED = ("corpus.txt", "text.txt", "tasks/test.jsonl")


@pytest.mark.parametrize("name", READERS)
def test_what_may_not_be_read_is_told_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_llama(tmp_path)
    (tmp_path / "tasks").mkdir()
    path = tmp_path / name
    path.touch()
    shut(path, monkeypatch)
    with pytest.raises(ClaError) as caught:
        READERS[name](path)
    assert caught.value.why == "You may not read or write there." and "chmod" in caught.value.fix
    assert path.name in caught.value.what and "Errno" not in str(caught.value)


def shut(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody open a file; its mode would not keep an administrator out."""

    def refuse(opened: object) -> None:
        if isinstance(opened, (str, os.PathLike)) and os.fspath(opened) == str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    for module, name in ((io, "open"), (builtins, "open"), (torch, "load")):
        monkeypatch.setattr(module, name, guarded(getattr(module, name), refuse))


def guarded(opening: Callable[..., object], refuse: Callable[[object], None]) -> Callable[..., object]:
    def guard(file: object, *rest: object, **more: object) -> object:
        refuse(file)
        return opening(file, *rest, **more)

    return guard


@pytest.mark.parametrize("name", ENCODED)
def test_another_encoding_is_told_with_how_to_mend_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(InputError) as caught:
        READERS[name](path)
    assert caught.value.why == "It is not UTF-8: byte 0xe9 is part of no letter there." and "iconv" in caught.value.fix


@pytest.mark.parametrize(
    ("path", "of_cache"), [("home/.cache", True), ("home/.cache/cla/tokens/x", True), ("out", False)]
)
def test_a_cache_that_cannot_be_written_to_is_named(
    path: str, of_cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / path))

    monkeypatch.setenv("CLA_CONVERT_CACHE", str(tmp_path / "home" / ".cache" / "cla"))
    monkeypatch.setattr("cla_convert.kept.entries", refuses)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["cla-convert", "cache", "ls"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 3 and ("CLA_CONVERT_CACHE" in capsys.readouterr().err) == of_cache


@pytest.mark.parametrize(("flag", "why"), [(os.ST_RDONLY, "The disk can be read only."), (0, "You may not read or")])
def test_a_disk_that_can_only_be_read_is_not_called_a_matter_of_permissions(
    flag: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flag))
    with pytest.raises(InputError, match=why):
        check_place(tmp_path / "out")
