"""What the plugin must not let pass: caches that would not be shared, or would be shared wrongly. And two processes."""

import json
from pathlib import Path

import pytest
import torch

from tests.vllm.engine import run
from tests.vllm.reference import greedy
from tests.vllm.test_families import PROMPTS, SMALL

UNKNOWN_VERSION = "import cla_convert.serving.versions as v; v.NEWEST = (0, 31)\n"


@pytest.fixture
def llama(conversions: Path) -> Path:
    return conversions / "llama" / "cla2"


def test_an_unknown_vllm_serves_no_cla_model(llama: Path, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(UNKNOWN_VERSION)
    found = run(tmp_path, llama, [[[1, 2]]], **SMALL, environment={"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"})
    assert "knows how vLLM 0.26 to 0.31 lay out the KV cache" in found["error"]


def test_fast_prefill_is_refused(llama: Path, tmp_path: Path):
    found = run(tmp_path, llama, [[[1, 2]]], **SMALL, kv_sharing_fast_prefill=True)
    assert "--kv-sharing-fast-prefill does not fit" in found["error"]


def test_gemma_in_float16_is_refused(conversions: Path, tmp_path: Path):
    found = run(tmp_path, conversions / "gemma3" / "cla2", [[[1, 2]]], **SMALL | {"dtype": "float16"})
    assert "overflow in float16" in found["error"]


def test_a_vllm_that_leaves_out_sinks_serves_no_model_that_has_them(conversions: Path, tmp_path: Path):
    """As 0.26 does: its Transformers backend has no such check."""
    backend = "vllm.model_executor.models.transformers"
    (tmp_path / "sitecustomize.py").write_text(f"import {backend} as backend\ndel backend.check_sinks\n")
    path = {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    found = run(tmp_path, conversions / "gpt_oss" / "cla2", [[[1, 2]]], **SMALL, environment=path)
    assert "leaves out attention sinks" in found["error"]


TWO = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("case", "kind"), [("llama", "cla2"), ("llama", "cla2-heads"), ("qwen3", "cla2-heads")])
def test_tensor_parallelism(case: str, kind: str, conversions: Path, tmp_path: Path):
    """With one KV head, too, of which both processes have a copy."""
    folder = conversions / case / kind
    found = run(tmp_path, folder, [PROMPTS], **SMALL, tensor_parallel_size=2, environment=TWO)
    assert "error" not in found, found["log"][-3000:]
    for ours, theirs in zip(greedy(folder, PROMPTS), found["rounds"][0], strict=True):
        assert theirs["tokens"] == ours["tokens"]
        torch.testing.assert_close(torch.tensor(theirs["logprobs"]), torch.tensor(ours["logprobs"]), rtol=0, atol=1e-3)
    assert found["log"].count("3 of 6 layers keep") == 2


def test_heads_that_cannot_be_spread_are_refused(conversions: Path, tmp_path: Path):
    """Of OLMo 2 every process would have all heads, and vLLM would read beyond them."""
    for case, what in (("llama-odd", "3 KV heads cannot be spread over 2"), ("olmo2", "OLMo 2 cannot run in 2")):
        folder = conversions / case / "cla2"
        found = run(tmp_path, folder, [[[1, 2]]], **SMALL, tensor_parallel_size=2, environment=TWO)
        assert what in found["error"]


def test_pipeline_stages_share_within_themselves(llama: Path, tmp_path: Path):
    """As far as this build goes: vLLM 0.32 for CPUs starts with two stages, and then answers with no model at all."""
    assert json.loads((llama / "config.json").read_text())["kv_source_layers"] == [0, 0, 2, 2, 4, 4]
    partition = {"VLLM_PP_LAYER_PARTITION": "2,4"}
    found = run(tmp_path, llama, [[[1, 2]]], **SMALL, pipeline_parallel_size=2, environment=TWO | partition)
    assert "1 of 2 layers keep" in found["log"] and "2 of 4 layers keep" in found["log"]
    assert "KV cache size" in found["log"]


def test_a_pipeline_that_parts_a_pair_is_refused(llama: Path, tmp_path: Path):
    found = run(tmp_path, llama, [[[1, 2]]], **SMALL, pipeline_parallel_size=2, environment=TWO)
    assert "lacks layer 2, whose keys and values layer 3 reads" in found["error"]
    assert "layers 2, 4: name the number of layers of each in VLLM_PP_LAYER_PARTITION" in found["error"]
