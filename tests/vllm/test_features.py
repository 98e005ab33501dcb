"""What people switch on in vLLM, on a converted model: the tokens stay transformers'."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vllm.engine import run
from tests.vllm.reference import greedy
from tests.vllm.test_families import PROMPTS, SMALL

RANK = 4


@pytest.fixture
def llama(conversions: Path) -> Path:
    return conversions / "llama" / "cla2"


def same_tokens(work: Path, folder: Path, expected: Path, **engine: Any) -> dict[str, Any]:
    found = run(work, folder, [PROMPTS], **SMALL | engine)
    assert "error" not in found, found["log"][-3000:]
    assert [one["tokens"] for one in found["rounds"][0]] == [one["tokens"] for one in greedy(expected, PROMPTS)]
    assert (found["buffers"], found["layers"], found["free"]) == (3, 6, found["blocks"] - 1)
    return found


def test_a_folder_that_was_moved_and_has_lost_all_but_the_model(llama: Path, tmp_path: Path):
    """No code, no manifest: what is needed stands in config.json."""
    moved = tmp_path / "another name"
    shutil.copytree(llama, moved, ignore=shutil.ignore_patterns("*.py", "cla_manifest.json"))
    same_tokens(tmp_path, moved, llama)


def test_speculation_by_ngrams(llama: Path, tmp_path: Path):
    """Tokens that were guessed wrongly leave nothing in the owners' caches."""
    guess = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    same_tokens(tmp_path, llama, llama, speculative_config=guess)


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], ["q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"]])
def test_lora(targets: list[str], llama: Path, tmp_path: Path):
    """Consumers have no k_proj and v_proj to adapt; owners' are one with q_proj in vLLM."""
    torch.manual_seed(5)
    weights, adapter = load_file(llama / "model.safetensors"), {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.split(".")[-1] in targets:
            down, up = torch.randn(RANK, weight.shape[1]) * 0.3, torch.randn(weight.shape[0], RANK) * 0.3
            adapter |= {
                f"base_model.model.{module}.lora_A.weight": down,
                f"base_model.model.{module}.lora_B.weight": up,
            }
            weights[name] = weight + up @ down
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "bias": "none"}
    for folder, tensors in ((tmp_path / "merged", weights), (tmp_path / "adapter", adapter)):
        shutil.copytree(llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter" / "model.safetensors").rename(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    assert greedy(llama, PROMPTS) != greedy(tmp_path / "merged", PROMPTS)
    same_tokens(tmp_path, llama, tmp_path / "merged", enable_lora=True, max_lora_rank=8, adapter=tmp_path / "adapter")
