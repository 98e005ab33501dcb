"""Fixtures of several unit tests."""

from pathlib import Path

import pytest

from .run_files import write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder in which every stage has run."""
    return write_run(tmp_path / "run")
