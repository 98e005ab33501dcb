"""What depends on where in a text a token stands: windows, and RoPE that is another one for long texts.

vLLM's Transformers backend gets both wrong by itself, without a word.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cla_convert.models.classes import register
from cla_convert.serving.rope import settle_frequencies
from tests.vllm.engine import run
from tests.vllm.reference import greedy
from tests.vllm.test_families import PROMPTS, SMALL

TRAINED = 64
"""Tokens; beyond, `BY_LENGTH` of the conversions have other frequencies."""
LONG = [[5, 9, 7] * 40, list(range(100, 180)), list(range(3, 90))]
SHORT = [list(range(3, 40)), [5, 9, 7] * 10]


def as_computed(
    work: Path, folder: Path, prompts: list[list[int]], expected: list[dict[str, list[Any]]], **engine: Any
) -> dict[str, Any]:
    """In chunks of 16 tokens, all at once."""
    new = len(expected[0]["tokens"])
    found = run(work, folder, [prompts], new, **SMALL | {"max_num_batched_tokens": 16} | engine)
    assert "error" not in found, found["log"][-3000:]
    for ours, theirs in zip(expected, found["rounds"][0], strict=True):
        assert theirs["tokens"] == ours["tokens"]
        torch.testing.assert_close(torch.tensor(theirs["logprobs"]), torch.tensor(ours["logprobs"]), rtol=0, atol=1e-3)
    return found


def test_longrope_beyond_what_was_trained(conversions: Path, tmp_path: Path):
    """Chunks of a text are short as well, and are read beside others."""
    folder = conversions / "longrope" / "cla2"
    assert all(len(prompt) > TRAINED for prompt in LONG)
    found = as_computed(tmp_path, folder, LONG, greedy(folder, LONG))
    assert "RoPE of type longrope is that of texts of 384 tokens" in found["log"]


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_no_longer_than_what_was_trained(kind: str, conversions: Path, tmp_path: Path):
    folder = conversions / kind / "cla2"
    as_computed(tmp_path, folder, SHORT, greedy(folder, SHORT), max_model_len=TRAINED)


def test_dynamic_scaling_is_that_of_the_longest_text(conversions: Path, tmp_path: Path):
    folder = conversions / "dynamic" / "cla2"
    register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert settle_frequencies(model, SMALL["max_model_len"]) == ["dynamic"]
    as_computed(tmp_path, folder, LONG, greedy(model, LONG))


@pytest.mark.parametrize("case", ["unused", "unknown"])
def test_a_window_that_no_layer_has(case: str, conversions: Path, tmp_path: Path):
    """In a family that ignores it, and where config.json lists full layers only."""
    folder = conversions / case / "cla2"
    expected = greedy(folder, PROMPTS, use_cache=False)  # its caches would heed the window
    found = as_computed(tmp_path, folder, PROMPTS, expected)
    assert found["groups"] == [[3, "FullAttentionSpec"]]
