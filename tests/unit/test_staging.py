"""What appears whole or not at all, where processes of one number, other machines and killed ones share a folder."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cla_convert import kept as kept_module
from cla_convert import staging
from cla_convert.errors import InputError
from cla_convert.files import atomic
from cla_convert.kept import kept
from cla_convert.models.source import resolve_source
from cla_convert.models.writer import MANIFEST, publishing
from tests.conftest import save_tiny_llama, wait_for

FOREIGN = "0" * 8
"""The mark of another kernel."""


@contextmanager
def another_process(folder: Path, script: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with our number, as in another container; it says `go` by a file and goes on once `end` is there."""
    text = f"import os, time; from pathlib import Path; folder = Path({str(folder)!r})\n"
    text += f"os.getpid = lambda: {os.getpid()}\n"
    text += "def moment():\n    (folder / 'go').touch()\n    while not (folder / 'end').exists(): time.sleep(0.01)\n"
    process = subprocess.Popen([sys.executable, "-c", text + script], stderr=subprocess.DEVNULL)
    wait_for(lambda: (folder / "go").exists() or process.poll() is not None)
    try:
        assert process.poll() is None
        yield process
    finally:
        (folder / "end").touch()
        process.wait(300)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("go", "end"))


PUBLISH = """
from cla_convert.models.writer import publishing
with publishing(folder / "out") as staging:
    (staging / "cla_manifest.json").write_text("{}")
    moment()
    (staging / "whole").write_text("theirs")
"""
KEEP = """
from cla_convert.kept import kept
def make(out):
    (out / "first").write_text("1")
    moment()
    (out / "second").write_text("2")
kept(folder / "entry", make)
"""


def test_a_folder_that_another_process_writes_is_not_touched(tmp_path: Path) -> None:
    with another_process(tmp_path, PUBLISH) as other:
        with pytest.raises(InputError, match="Another process is writing"), publishing(tmp_path / "out"):
            pass
        (tmp_path / "end").touch()
        assert other.wait(300) == 0
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "whole").read_text() == "theirs"


def test_an_entry_that_another_process_makes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        (tmp_path / "end").touch()  # no sooner, however long this took

    monkeypatch.setattr(staging, "say", say)
    with another_process(tmp_path, KEEP):
        kept(tmp_path / "entry", lambda out: pytest.fail("made twice"))
    assert names(tmp_path / "entry") == [".sizes.json", "first", "second"] and names(tmp_path) == ["entry"]
    assert said == [f"waiting for another process that makes {tmp_path / 'entry'}"]


def test_without_locks_nothing_of_others_is_removed_and_the_first_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "fcntl", None)
    left = [tmp_path / f".entry.partial-{staging._kernel()}-1", tmp_path / f".entry.old-{staging._kernel()}-2"]

    def make(out: Path) -> None:
        assert all(folder.exists() for folder in left)
        (out / "x").write_text("second")
        if out.parent == tmp_path and not (tmp_path / "entry").exists():  # meanwhile another one is faster
            kept(tmp_path / "entry", lambda other: (other / "x").write_text("first"))

    for folder in left:
        folder.mkdir()
    kept(tmp_path / "entry", make)
    assert (tmp_path / "entry" / "x").read_text() == "first"
    assert names(tmp_path) == sorted([*(folder.name for folder in left), "entry"])


@pytest.mark.parametrize("whole", [True, False])
def test_without_locks_another_may_be_faster_at_the_very_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Between the last look and the renaming: the first stays, and a published model is told of, not replaced."""
    monkeypatch.setattr(staging, "fcntl", None)
    renamed = staging._renamed

    def late(folder: Path, out: Path) -> bool:
        monkeypatch.setattr(staging, "_renamed", renamed)
        if whole:
            kept(out, lambda other: (other / "x").write_text("first"))
        else:
            with publishing(out) as other:
                (other / "x").write_text("first")
        return renamed(folder, out)

    monkeypatch.setattr(staging, "_renamed", late)
    if whole:
        kept(tmp_path / "entry", lambda out: (out / "x").write_text("second"))
    else:
        with pytest.raises(InputError, match="entry is not empty"), publishing(tmp_path / "entry") as out:
            (out / "x").write_text("second")
    assert (tmp_path / "entry" / "x").read_text() == "first" and names(tmp_path) == ["entry"]


@pytest.mark.parametrize("stays", [True, False])
def test_an_entry_may_go_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stays: bool) -> None:
    """Another process puts it back, having made it again, or has removed it for good."""
    entry = kept(tmp_path / "entry", lambda out: (out / "x").write_text("first"))
    sizes = kept_module._sizes

    def vanishing(folder: Path) -> dict[str, int]:
        monkeypatch.setattr(kept_module, "_sizes", sizes)
        if not stays:
            shutil.rmtree(folder)
        raise FileNotFoundError(2, "No such file or directory", str(folder / "x"))

    monkeypatch.setattr(kept_module, "_sizes", vanishing)
    kept(entry, lambda out: (out / "x").write_text("again"))
    assert (entry / "x").read_text() == ("first" if stays else "again") and names(tmp_path) == ["entry"]


def test_what_another_kernel_left_is_removed_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / f".out.partial-{FOREIGN}-1"
    folder.mkdir()
    os.utime(folder, (0, 0))
    (folder / "shard").touch()  # a folder's own time says nothing of what is written into its files
    for day, there in ((60, True), (-1, False)):
        monkeypatch.setattr(staging, "_DAY", day)
        with publishing(tmp_path / "out", overwrite=True) as staged:
            (staged / MANIFEST).write_text("{}")
        assert folder.exists() == there


@pytest.mark.parametrize("name", ["llama.v2", "llama.old-1", "llam"])
def test_what_another_name_left_is_not_ours(tmp_path: Path, name: str) -> None:
    old = staging.beside(tmp_path / name, "old")
    old.mkdir()
    (old / "weights").write_text("the only copy")
    with publishing(tmp_path / "llama"):
        pass
    assert (old / "weights").read_text() == "the only copy"
    with staging.claimed(tmp_path / name):
        assert (tmp_path / name / "weights").read_text() == "the only copy"


def test_what_was_moved_aside_is_put_back_before_it_is_judged(tmp_path: Path) -> None:
    old = staging.beside(tmp_path / "a[1]", "old")  # no pattern
    old.mkdir()
    (old / MANIFEST).write_text("{}")
    with pytest.raises(InputError, match="not empty"), publishing(tmp_path / "a[1]"):
        pass
    assert names(tmp_path) == ["a[1]"]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "theirs").touch()
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "elsewhere")
    with staging.claimed(out), staging.staged(out, wanted=lambda: True) as made:
        (made / "new").touch()
    assert (out / "new").exists() and not out.is_symlink()
    assert (tmp_path / "elsewhere" / "theirs").exists() and len(list(tmp_path.iterdir())) == 2
    staging.beside(out, "old").symlink_to(tmp_path / "elsewhere")  # what a killed process left
    with staging.claimed(out):
        assert (tmp_path / "elsewhere" / "theirs").exists() and len(list(tmp_path.iterdir())) == 3  # the lock


def test_the_lock_goes_to_one_of_those_who_wait(tmp_path: Path) -> None:
    """Who had the lock removes its file; those who waited for it must not each hold one."""
    script = (
        "import sys; from pathlib import Path; from cla_convert.staging import claimed\n"
        "folder = Path(sys.argv[1])\n"
        "for _ in range(300):\n"  # without pauses: the file that one looks at is being removed by another
        "    with claimed(folder / 'x', wait=True):\n"
        "        (folder / 'mine').mkdir(); (folder / 'mine').rmdir()\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.DEVNULL) for _ in "123"
    ]
    assert [process.wait(300) for process in processes] == [0, 0, 0] and names(tmp_path) == []


def test_a_lock_whose_file_went_meanwhile_is_not_held(tmp_path: Path) -> None:
    """Whoever held it removed the file, and the next one's too, before this process could look."""
    name = tmp_path / "lock"
    with name.open("w") as mine:
        assert staging.is_at(name, mine.fileno())
        name.unlink()
        assert not staging.is_at(name, mine.fileno())
        name.touch()
        assert not staging.is_at(name, mine.fileno())


def test_files_have_temporary_names_of_their_own(tmp_path: Path) -> None:
    with atomic(tmp_path / "x") as one, atomic(tmp_path / "x") as two:
        one.write(b"one")
        two.write(b"two")
    assert (tmp_path / "x").read_bytes() == b"one" and names(tmp_path) == ["x"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def recorded(path: Path) -> None:
        synced.append("parent" if path == tmp_path else path.name.partition("-")[0])
        assert (tmp_path / "entry").exists() == (path == tmp_path)

    monkeypatch.setattr(staging, "sync", recorded)
    kept(tmp_path / "entry", lambda out: (out / "x").write_text("x"))
    assert sorted(synced[:-2]) == [".sizes.json", "x"] and synced[-2:] == [".entry.partial", "parent"]


@pytest.mark.parametrize("damage", ["cut", "gone", "no record"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    entry = tmp_path / "entry"
    for _ in range(2):
        kept(entry, lambda out: (out / "x").write_text("whole"))
    assert "damaged" not in capsys.readouterr().err
    if damage == "cut":
        os.truncate(entry / "x", 2)
    else:
        (entry / ("x" if damage == "gone" else ".sizes.json")).unlink()
    kept(entry, lambda out: (out / "x").write_text("whole"))
    assert (entry / "x").read_text() == "whole" and "damaged: it is made again" in capsys.readouterr().err
    assert names(tmp_path) == ["entry"]


@pytest.mark.parametrize("name", [".DS_Store", ".nfs000000000004", "sub/Thumbs.db"])
def test_what_the_system_puts_into_an_entry_is_no_damage(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = tmp_path / "entry"
    kept(entry, lambda out: (out / "x").write_text("whole"))
    (entry / name).parent.mkdir(exist_ok=True)
    (entry / name).write_text("theirs")
    kept(entry, lambda out: (out / "x").write_text("made anew"))
    assert (entry / "x").read_text() == "whole" and "damaged" not in capsys.readouterr().err


@pytest.fixture
def pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLA_CONVERT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pickled"
    save_tiny_llama(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "chat.jinja"])
def test_what_is_mended_beside_pickled_weights_counts(pickled: Path, name: str) -> None:
    first = resolve_source(str(pickled), allow_pickle=True)
    assert resolve_source(str(pickled), allow_pickle=True) == first
    path = pickled / name
    content = (json.loads(path.read_text()) if path.exists() else {}) | {"eos_token_id": 7}
    path.write_text(json.dumps(content))
    assert json.loads((resolve_source(str(pickled), allow_pickle=True) / name).read_text()) == content


def test_a_damaged_copy_of_the_weights_is_made_again(pickled: Path) -> None:
    copy = resolve_source(str(pickled), allow_pickle=True)
    weights = (copy / "model.safetensors").read_bytes()
    os.truncate(copy / "model.safetensors", 100)
    assert (resolve_source(str(pickled), allow_pickle=True) / "model.safetensors").read_bytes() == weights
