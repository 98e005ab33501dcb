"""Real models through the engine: tokens, capacity, chunked prefill, prefix caching, windows."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cla_convert.models.export import register
from tests.vllm.conftest import Pair
from tests.vllm.engine import run
from tests.vllm.reference import greedy

BATCH = 256
"""Tokens of a prefill chunk."""
TEXT = (
    "The history of the lighthouse on the northern cape begins with a storm. In the winter of {year}, three ships were "
    "lost within a week, and the harbour council voted, by a majority of one, to build a tower of granite. "
)


def prompts(model: Path) -> list[list[int]]:
    """Short ones, one longer than a chunk, one longer than Gemma's window of 512 tokens."""
    register()
    tokenizer = AutoTokenizer.from_pretrained(model)
    long = "".join(TEXT.format(year=year) for year in range(1790, 1812))
    texts = ["The capital of France is", "def fibonacci(n):\n", TEXT.format(year=1811), long[:1500], long]
    ids = [tokenizer(text).input_ids for text in texts]
    assert len(ids[-1]) > 700 and BATCH < len(ids[-2]) < 512
    return ids


def served(folder: Path, model: Path, asked: list[list[list[int]]], **engine) -> dict:
    found = run(folder, model, asked, max_model_len=2048, max_num_batched_tokens=BATCH, max_num_seqs=8, **engine)
    assert "error" not in found, found["log"][-3000:]
    return found


def check_tokens(folder: Path, model: Path, **engine) -> dict:
    """All prompts at once, in chunks; then again, from the prefix cache."""
    asked = prompts(model)
    expected = [answer["tokens"] for answer in greedy(model, asked)]
    found = served(folder, model, [asked, asked], **engine)
    first, second = found["rounds"]
    assert [answer["tokens"] for answer in first] == expected
    assert [answer["tokens"] for answer in second] == expected
    assert second[-1]["cached"] >= 512 > first[-1]["cached"]  # whole blocks; two prompts begin alike
    assert found["free"] == found["blocks"] - 1
    return found


def test_smollm2(smollm2: Pair, tmp_path: Path):
    found = check_tokens(tmp_path, smollm2.converted)
    before = served(tmp_path, smollm2.source, [[[1, 2, 3]]])
    assert (before["buffers"], found["buffers"]) == (30, 16)
    # Blocks in 1 GiB: 182 and 341. Of the same number of bytes a block, 30/16 times as many fit, but for a rest.
    assert found["blocks"] == found["tokens"] // 128 == int(2**30 / (16 * 128 * 1536))
    assert before["blocks"] == before["tokens"] // 128 == int(2**30 / (30 * 128 * 1536))
    assert before["bytes"] / before["tokens"] * 16 == found["bytes"] / found["tokens"] * 30


def test_one_kv_head_instead_of_three(pooled: Pair, tmp_path: Path):
    """16 of 30 layers with a third of the heads: 5.625 times the tokens of the source, in whole blocks."""
    found = check_tokens(tmp_path, pooled.converted)
    assert found["buffers"] == 16
    assert "KV heads: 1 instead of 3; 8,192 bytes a token: the same memory holds 5.62x the tokens" in found["log"]
    assert found["blocks"] == found["tokens"] // 128 == int(2**30 / (16 * 128 * 512))
    assert found["bytes"] / found["tokens"] == 8192 == 30 * 1536 / 5.625


def test_gemma_with_its_windows(gemma: Pair, tmp_path: Path):
    found = check_tokens(tmp_path, gemma.converted)
    before = served(tmp_path, gemma.source, [[[1, 2, 3]]])
    # Groups of equal size: 15 sliding and 3 full layers became 8 and 2.
    full, sliding = "FullAttentionSpec", "SlidingWindowSpec"
    assert sorted(before["groups"]) == [[3, full]] + [[3, sliding]] * 5
    assert sorted(found["groups"]) == [[2, full]] + [[2, sliding]] * 4
    # A sequence of 2048 tokens takes 16 blocks of a full group; of a sliding one 7, for its window and a chunk.
    assert before["tokens"] == int(before["blocks"] / (16 + 5 * 7) * 2048) == 54814
    assert found["tokens"] == int(found["blocks"] / (16 + 4 * 7) * 2048) == 95325


BARE = {"trust_remote_code": True, "environment": {"VLLM_PLUGINS": ""}}


def test_without_the_plugin_a_full_cache_is_refused(smollm2: Pair, tmp_path: Path):
    """The folder's own code runs then, in a vLLM that knows nothing of sharing."""
    found = run(tmp_path, smollm2.converted, [[[1, 2, 3]]], **BARE)
    assert "Nothing tells vLLM that layers share keys and values here" in found["error"]


def test_without_the_plugin_nothing_is_saved(smollm2: Pair, tmp_path: Path):
    """What the plugin is for: the same folder in a vLLM that does not load it, by a user who asks for that."""
    found = served(tmp_path, smollm2.converted, [[[1, 2, 3]]], **BARE, hf_overrides={"vllm_kv_cache": "full"})
    assert found["buffers"] == 30


@pytest.mark.parametrize("implementation", ["auto", "vllm", "transformers"])
def test_no_way_of_asking_leaves_the_plugin_out(smollm2: Pair, tmp_path: Path, implementation: str):
    found = served(tmp_path, smollm2.converted, [[[1, 2, 3]]], model_impl=implementation, trust_remote_code=True)
    assert found["buffers"] == 16
