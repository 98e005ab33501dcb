"""Converted models as their users have them: folders, and processes that find them there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cla_convert.conversion.convert import convert
from cla_convert.conversion.plan import make_plan
from cla_convert.models.checkpoint import Checkpoint
from tests.tiny import save_tiny

CLIENTS = Path(__file__).parent / "clients"


@pytest.fixture(scope="session")
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a converted model, a Llama unless the test asks for another case of tests/tiny.py."""
    case = getattr(request, "param", "llama")
    folder = tmp_path_factory.mktemp(case)
    source = Checkpoint.open(save_tiny(case, folder / "source"))
    convert(make_plan(source, sharing="cla2", init="mean"), source, folder / "model")
    return folder / "model"


@pytest.fixture
def client(tmp_path: Path):
    """Run a command of Python's, or a script of clients/, in a process of its own; its output."""

    def run(*arguments: object) -> str:
        words = [str(CLIENTS / f"{word}.py") if index == 0 else str(word) for index, word in enumerate(arguments)]
        if arguments[0] == "-m":
            words = ["-m", *words[1:]]
        environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
