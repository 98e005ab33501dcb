"""Fixtures of several unit tests."""

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from .run_files import write_run

# The same examples every time, however busy the machine: what is found elsewhere becomes an example here.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.load_profile("same")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder in which every stage has run."""
    return write_run(tmp_path / "run")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors here are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
