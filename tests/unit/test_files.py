"""A folder to oneself, and files that another process removes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cla_convert import files
from cla_convert.errors import InputError
from cla_convert.files import alone_in, read_json, read_rows
from cla_convert.models.writer import check_output


def test_who_is_refused_leaves_the_folder_to_the_one_at_work(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with alone_in(folder):
        for _ in range(2):  # being refused does not take the lock away
            with pytest.raises(InputError, match="Another process is at work"), alone_in(folder):
                pass
            assert folder.exists()
    assert not folder.exists()


def test_what_was_written_stays_and_the_folder_is_free_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), alone_in(tmp_path / "run"):
        (tmp_path / "run" / "result").touch()
        raise RuntimeError
    with alone_in(tmp_path / "run"):
        assert (tmp_path / "run" / "result").exists()


@pytest.mark.parametrize("moment", ["open", "lock"])
def test_a_folder_that_went_before_it_was_locked_is_made_again(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was alone in it has left it empty: a lock on what has no name any more would hold nobody off."""
    folder, module = tmp_path / "run", os if moment == "open" else files
    real: Callable[..., Any] = getattr(module, moment)

    def late(*given: Any, **options: Any) -> Any:
        monkeypatch.setattr(module, moment, real)
        folder.rmdir()
        return real(*given, **options)

    monkeypatch.setattr(module, moment, late)
    with alone_in(folder):
        assert folder.is_dir() and getattr(module, moment) is real
        with pytest.raises(InputError, match="Another process is at work"), alone_in(folder):
            pass


@pytest.mark.parametrize("read", [read_json, read_rows, lambda path: check_output(path, overwrite=False)])
def test_what_goes_while_it_is_looked_for_is_not_there(
    tmp_path: Path, read: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there when somebody asks, and gone when it is opened."""
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert not read(tmp_path / "gone")


def test_rows_before_a_line_that_was_cut_short_are_whole_and_other_damage_is_told(tmp_path: Path) -> None:
    file, rows = tmp_path / "metrics.jsonl", [{"step": n} for n in range(3)]
    lines = [json.dumps(row).encode() for row in rows]
    for last in (b"", b'{"step"', b"\xff\x00", b"[1]\n", b"\n\n"):
        file.write_bytes(b"\n".join([*lines, last]))
        assert read_rows(file) == rows
    for damaged in (b'{"step"', b"\xff"):
        file.write_bytes(b"\n".join([lines[0], damaged, lines[2]]) + b"\n")
        with pytest.raises(InputError, match="metrics.jsonl is damaged") as told:  # all later rows would be lost
            read_rows(file)
        assert "Line 2" in told.value.why


def test_a_damaged_file_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path / "x.json")
