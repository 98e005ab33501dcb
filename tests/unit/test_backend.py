"""What scores the tasks: vLLM where it can, a refusal in words where it cannot."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from cla_convert.errors import InputError, UsageError
from cla_convert.evaluation import backend
from cla_convert.evaluation.backend import check_backend
from cla_convert.evaluation.harness import common_settings
from cla_convert.recipe import Evaluate
from cla_convert.serving import versions
from tests.launch import cla

VLLM = Evaluate(backend="vllm")


def not_installed(name: str) -> str:
    raise PackageNotFoundError(name)


def test_without_vllm_nothing_begins(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions, "version", not_installed)
    check_backend(Evaluate(), "cpu")
    with pytest.raises(InputError, match=r"not installed(.|\n)*--backend hf"):
        check_backend(VLLM, "cpu")


def test_the_command_line_passes_the_backend_on(tiny_llama: Path, tmp_path: Path):
    for name, code in (("sglang", 2), ("vllm", 3)):  # of these neither is installed here
        done = cla("eval", tiny_llama, "--backend", name, "--set", "device=cpu", "--out", tmp_path / "out")
        assert done.returncode == code and "vllm" in done.stderr.lower() and "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()


def test_places_where_vllm_cannot_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions, "version", lambda _: "0.25.0")
    with pytest.raises(InputError, match=r"vLLM 0\.25\.0 cannot"):
        check_backend(VLLM, "cuda")
    monkeypatch.setattr(versions, "version", lambda _: "0.30.0")
    check_backend(VLLM, "cuda")
    for device in ("cuda:1", "mps"):
        with pytest.raises(UsageError, match=device):
            check_backend(VLLM, device)
    monkeypatch.setattr(backend, "world_size", lambda: 2)
    with pytest.raises(UsageError, match="tensor_parallel_size"):
        check_backend(VLLM, "cuda")


def test_the_backend_is_part_of_the_specification(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cla_convert.evaluation.harness.version", lambda _: "1")
    asked = ({"max_num_seqs": 2}, {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5})
    hf, vllm, other, elsewhere = (
        common_settings(spec, "cpu", 0)
        for spec in (Evaluate(), VLLM, *(Evaluate(backend="vllm", vllm=settings) for settings in asked))
    )
    assert hf["backend"] != vllm["backend"] != other["backend"]
    assert elsewhere == vllm  # where it lies
    assert "vllm" in vllm["versions"] and "vllm" not in hf["versions"]
