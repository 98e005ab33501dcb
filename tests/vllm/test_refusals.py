"""What the plugin must not let pass: caches that would not be shared, or would be shared wrongly. And two processes."""

import json
from pathlib import Path

import pytest
import torch
from vllm.config.model import _FLOAT16_NOT_SUPPORTED_MODELS  # pyright: ignore[reportMissingImports]

from cla_convert.models.families import FAMILIES
from tests.vllm.engine import run
from tests.vllm.reference import greedy
from tests.vllm.test_families import PROMPTS, SMALL

UNKNOWN_VERSION = "import cla_convert.serving.versions as v; v.NEWEST = (0, 31)\n"


ATTENTION = "from vllm.model_executor.layers.attention import Attention as A\nold = A.__init__\n"
FORGETS = (
    f"{ATTENTION}def new(self, *values, kv_sharing_target_layer_name=None, **named): old(self, *values, **named)\n"
    "A.__init__ = new\n"
)
MIXES = (
    f"{ATTENTION}def new(self, *values, **named):\n    old(self, *values, **named)\n"
    "    self.head_size += 'kv_sharing_target_layer_name' in named\nA.__init__ = new\n"
)
COPIES = (
    f"{ATTENTION}def bind(self, cache): self.kv_cache = cache.clone() if self.kv_sharing_target_layer_name else cache\n"
    "A.bind_kv_cache = bind\n"
)


@pytest.fixture
def llama(conversions: Path) -> Path:
    return conversions / "llama" / "cla2"


def test_an_unknown_vllm_serves_no_cla_model(llama: Path, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(UNKNOWN_VERSION)
    found = run(tmp_path, llama, [[[1, 2]]], **SMALL, environment={"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"})
    assert "knows how vLLM 0.26 to 0.31 lay out the KV cache" in found["error"]


@pytest.mark.parametrize(
    ("vllm", "reason"),
    [(FORGETS, "would keep KV caches for layers [0, 1, 2, 3, 4, 5], and the model's owners are [0, 2, 4]"),
     (MIXES, "would read the KV cache of layer 0 in another format for layer 1"),
     (COPIES, "gave layer 1 a KV cache of its own, instead of that of layer 0")],
)  # fmt: skip
def test_a_vllm_that_shares_nothing_or_wrongly_serves_nothing(vllm: str, reason: str, llama: Path, tmp_path: Path):
    """As a version could whose hooks are called like those of another and do something else."""
    (tmp_path / "sitecustomize.py").write_text(vllm)
    found = run(tmp_path, llama, [[[1, 2]]], **SMALL, environment={"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"})
    assert reason in found["error"]


def test_fast_prefill_is_refused(llama: Path, tmp_path: Path):
    found = run(tmp_path, llama, [[[1, 2]]], **SMALL, kv_sharing_fast_prefill=True)
    assert "--kv-sharing-fast-prefill does not fit" in found["error"]


@pytest.mark.parametrize(("case", "name"), [("gemma3", "Gemma 3"), ("glm4", "GLM-4")])
def test_families_that_overflow_in_float16_are_refused(case: str, name: str, conversions: Path, tmp_path: Path):
    """As vLLM's own list has them, which knows converted models by another name."""
    found = run(tmp_path, conversions / case / "cla2", [[[1, 2]]], **SMALL | {"dtype": "float16"})
    assert f"{name} overflows in float16" in found["error"]
    ours = _FLOAT16_NOT_SUPPORTED_MODELS.keys() & FAMILIES.keys()
    assert ours == {"gemma2", "gemma3_text", "glm4"}


def test_beside_an_old_transformers_other_models_are_served_as_ever(conversions: Path, tmp_path: Path):
    """vLLM 0.26 admits one that lacks families of ours, and ends where a plugin raises."""
    lacking = "import sys\nsys.modules['cla_convert.models.generated.configuration_cla_solar_open'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(lacking)
    path = {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    found = run(tmp_path, conversions / "llama" / "source", [PROMPTS], 1, **SMALL, environment=path)
    assert "error" not in found, found["log"][-3000:]
    assert "they need transformers 5.16" in found["log"]


def test_a_vllm_that_leaves_out_sinks_serves_no_model_that_has_them(conversions: Path, tmp_path: Path):
    """As 0.26 does: its Transformers backend has no such check."""
    backend = "vllm.model_executor.models.transformers"
    (tmp_path / "sitecustomize.py").write_text(f"import {backend} as backend\ndel backend.check_sinks\n")
    path = {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    found = run(tmp_path, conversions / "gpt_oss" / "cla2", [[[1, 2]]], **SMALL, environment=path)
    assert "leaves out attention sinks" in found["error"]


def test_a_model_that_sees_images_is_refused(conversions: Path, tmp_path: Path):
    found = run(tmp_path, conversions / "whole" / "cla2", [[[1, 2]]], **SMALL, trust_remote_code=True)
    assert "vLLM does not serve Gemma 3" in found["error"] and "Convert with --text-only" in found["error"]


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
