"""One fingerprint of a model, over every byte that says what it is."""

import os
import shutil
from pathlib import Path

import pytest

from cla_convert.conversion.convert import convert
from cla_convert.conversion.plan import make_plan
from cla_convert.environment import cache_folder
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.fingerprint import fingerprint

HALF_A_GIGABYTE = 1 << 29


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLA_CONVERT_CACHE", str(tmp_path / "cache"))


def sparse(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(HALF_A_GIGABYTE)
    return folder


def write_at(path: Path, place: int, byte: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(byte)


def test_one_byte_of_half_a_gigabyte_counts_wherever_it_is(tmp_path: Path):
    weights = sparse(tmp_path / "model") / "model.safetensors"
    seen = {fingerprint(weights.parent)}
    for place in (0, 12345, (1 << 26) - 1, 1 << 26, 300_000_001, HALF_A_GIGABYTE - 1):
        write_at(weights, place, b"x")
        os.utime(weights, (0, 0))  # a tool that keeps the times must not hide what it wrote
        seen.add(fingerprint(weights.parent))
    assert len(seen) == 7


def test_a_cache_that_cannot_be_written_to_is_done_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """At the end of a conversion, most of all."""
    folder = sparse(tmp_path / "model")
    os.truncate(folder / "model.safetensors", 1 << 26)
    cache_folder().mkdir()
    (cache_folder() / "fingerprints").write_text("in the way")
    found = fingerprint(folder)
    assert "not kept" in capsys.readouterr().err
    (cache_folder() / "fingerprints").unlink()
    assert fingerprint(folder) == found


def test_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = sparse(tmp_path / "model")
    before = fingerprint(folder)
    assert len(list((cache_folder() / "fingerprints").iterdir())) == 1
    opened: list[Path] = []
    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: opened.append(path) or plain(path, *a, **k))
    assert fingerprint(folder) == before
    assert folder / "model.safetensors" not in opened


def test_a_damaged_cache_is_made_again(tmp_path: Path):
    folder = sparse(tmp_path / "model")
    before = fingerprint(folder)
    for kept in (cache_folder() / "fingerprints").iterdir():
        kept.write_text('{"sha256"')
    assert fingerprint(folder) == before


def test_two_conversions_of_one_map_differ(tmp_path: Path, tiny_llama: Path):
    checkpoint = Checkpoint.open(tiny_llama)
    for init in ("mean", "first"):
        convert(make_plan(checkpoint, sharing="cla2", init=init), checkpoint, tmp_path / init)
    assert fingerprint(tmp_path / "mean") != fingerprint(tmp_path / "first")


@pytest.mark.parametrize(
    ("name", "counts"),
    [("config.json", True), ("tokenizer.json", True), ("tokenizer_config.json", True), ("chat_template.jinja", True),
     ("modeling_x.py", True), ("README.md", False), ("LICENSE", False), ("cla_manifest.json", False)],
)  # fmt: skip
def test_what_says_what_a_model_is_counts(name: str, counts: bool, tmp_path: Path, tiny_llama: Path):
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    before = fingerprint(copy)
    assert before == fingerprint(tiny_llama)
    with (copy / name).open("a") as file:
        file.write(" ")
    assert (fingerprint(copy) != before) == counts
