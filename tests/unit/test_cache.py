"""What the cache holds can be seen, and what is not used any more can be removed."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cla_convert.cli import app
from cla_convert.environment import cache_folder
from cla_convert.kept import entries, kept, remove
from cla_convert.models.source import resolve_source
from cla_convert.staging import beside, claimed
from tests.conftest import save_tiny_llama


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLA_CONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_old(path: Path, days: float) -> None:
    for one in [path, *path.rglob("*")]:
        os.utime(one, (time.time() - days * 86_400,) * 2)


def said(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    app(["cache", *line], standalone_mode=False)
    return capsys.readouterr().out


def test_copies_of_a_model_that_changed_are_seen_and_go(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_llama(tmp_path / "mine")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    stale = resolve_source(str(model), allow_pickle=True)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    fresh = resolve_source(str(model), allow_pickle=True)
    assert stale != fresh
    for copy in (stale, fresh):
        make_old(copy, 31)
    resolve_source(str(model), allow_pickle=True)  # uses one of them
    listed = said(capsys, "ls")
    assert f"31 days ago   sources/{stale.name}" in listed and f"today         sources/{fresh.name}" in listed
    assert f"removed sources/{stale.name}" not in said(capsys, "prune", "--dry-run") and stale.exists()
    assert said(capsys, "prune").endswith("KiB freed\n")
    assert fresh.exists() and not stale.exists()


def test_files_are_shown_by_their_kind_and_go_by_their_age(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "eval").mkdir(parents=True)
    old, new = (cache / "eval" / f"{letter * 64}.json" for letter in "ab")
    for file in (old, new):
        file.write_text("x" * 2048)
    make_old(old, 8)
    assert "4.0 KiB  today         eval/ (2 files)" in said(capsys, "ls")
    result = json.loads(said(capsys, "ls", "--json"))
    assert result["bytes"] == 4096 and {entry["days_unused"] for entry in result["entries"]} == {0, 8}
    assert said(capsys, "prune", "--days", "9") == "0 B freed\n"
    gone = json.loads(said(capsys, "prune", "--days", "7", "--json"))
    assert [entry["name"] for entry in gone["entries"]] == [f"eval/{old.name}"]
    assert list((cache / "eval").iterdir()) == [new]
    said(capsys, "prune", "--days", "0")
    assert not list((cache / "eval").iterdir())


def test_what_others_keep_in_a_folder_that_is_named_as_the_cache_stays(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = [
        cache / name for name in ("Documents/thesis.txt", "datasets/imagenet/0.png", ".config/x.conf", "eval/o.md")
    ]
    for file in theirs:
        file.parent.mkdir(parents=True)
        file.write_text("x")
        make_old(file, 100)
    ours = kept(cache / "sources" / f"model-{'d' * 16}", lambda out: (out / "x").write_text("x"))
    left = cache / "tokens" / beside(Path("e" * 20), "partial").name
    left.mkdir(parents=True)
    assert {entry.path for entry in entries(cache)} == {ours, left}
    said(capsys, "prune", "--days", "0")
    assert all(file.exists() for file in theirs) and not ours.exists() and not left.exists()
    monkeypatch.setenv("CLA_CONVERT_CACHE", "")  # as if it was not set: not the folder that one stands in
    assert cache_folder() == Path.home() / ".cache" / "cla-convert"


def test_what_another_process_makes_stays(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = kept(cache / "tokens" / ("c" * 20), lambda out: (out / "x").write_text("x"))
    with claimed(folder):
        entry = next(entry for entry in entries(cache) if entry.path == folder)
        assert not remove(entry) and (folder / "x").exists()
    assert "stays: Another process is writing" in capsys.readouterr().err
    assert remove(entry) and not folder.exists()


def test_a_cache_that_is_not_there_holds_nothing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(cache, ignore_errors=True)
    assert said(capsys, "ls") == f"{cache}: 0 B\n" and said(capsys, "prune") == "0 B freed\n"
    assert not cache.exists()
