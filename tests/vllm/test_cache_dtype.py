"""A quantised KV cache: consumers read their owner's as it was written.

What they have to read is what vLLM without the plugin keeps for them: the same keys and values, once more.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vllm.engine import run
from tests.vllm.test_families import PROMPTS, SMALL

FULL = {
    "trust_remote_code": True, "hf_overrides": {"vllm_kv_cache": "full"}, "environment": {"VLLM_PLUGINS": ""},
}  # fmt: skip
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
OWNERS = [0, 0, 2, 2, 4, 4]
wide = pytest.mark.skipif(
    "AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="vLLM has no fp8 cache for CPUs without AVX-512"
)


def with_scales(folder: Path, target: Path, layers: list[int]) -> Path:
    """As llm-compressor writes it: the folder with scales of the cache for `layers`, each owner's another."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    assert config["kv_source_layers"] == OWNERS
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "dense", "quantization_status": "frozen", "config_groups": {},
        "ignore": [], "kv_cache_scheme": FP8,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    weights = load_file(target / "model.safetensors")
    for layer in layers:
        for n, kind in enumerate("kv"):
            weights[f"model.layers.{layer}.self_attn.{kind}_scale"] = torch.tensor(0.002 * (1 + OWNERS[layer] + n))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def same_answers(work: Path, shared: Path, full: Path, ours: dict, theirs: dict) -> None:
    found, expected = run(work, shared, [PROMPTS], **SMALL | ours), run(work, full, [PROMPTS], **SMALL | theirs | FULL)
    assert "error" not in found, found["log"][-3000:]
    assert "error" not in expected, expected["log"][-3000:]
    assert (found["buffers"], expected["buffers"]) == (3, 6)
    for one, other in zip(found["rounds"][0], expected["rounds"][0], strict=True):
        assert one["tokens"] == other["tokens"]
        torch.testing.assert_close(torch.tensor(one["logprobs"]), torch.tensor(other["logprobs"]), rtol=0, atol=1e-3)


@pytest.fixture
def llama(conversions: Path) -> Path:
    return conversions / "llama" / "cla2"


@wide
def test_fp8(llama: Path, tmp_path: Path):
    same_answers(tmp_path, llama, llama, {"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "fp8"})


@wide
def test_a_consumer_is_given_the_scales_of_its_owner(llama: Path, tmp_path: Path):
    shared = with_scales(llama, tmp_path / "shared", [0, 2, 4])
    full = with_scales(llama, tmp_path / "full", [0, 1, 2, 3, 4, 5])
    same_answers(tmp_path, shared, full, {}, {})


def test_formats_of_single_layers_are_refused(llama: Path, tmp_path: Path):
    found = run(tmp_path, llama, [[[1, 2]]], **SMALL, kv_cache_dtype="fp8", kv_cache_dtype_skip_layers=["3"])
    assert "--kv-cache-dtype-skip-layers 3 does not fit" in found["error"]


def test_scales_that_lie_in_the_cache_by_layer_are_refused(llama: Path, tmp_path: Path):
    found = run(tmp_path, llama, [[[1, 2]]], **SMALL, kv_cache_dtype="fp8_per_token_head")
    assert "--kv-cache-dtype fp8_per_token_head does not fit" in found["error"]
