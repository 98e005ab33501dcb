"""A folder to oneself."""

from pathlib import Path

import pytest

from cla_convert.errors import InputError
from cla_convert.files import alone_in


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
