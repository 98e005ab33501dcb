"""Every family through vLLM: transformers' tokens and log-probabilities, and a KV cache of the owners alone."""

from pathlib import Path

import pytest
import torch

from cla_convert.models.families import FAMILIES
from cla_convert.models.shape import shape_of
from tests.conftest import byte_tokenizer
from tests.tiny import CASES, cla_model, tiny_config
from tests.vllm.engine import run
from tests.vllm.reference import greedy

SHAPE = {"hidden_size": 128, "head_dim": 32}  # vLLM's attention takes heads of 32 channels or more
SHAPES = {"llama-odd": {"hidden_size": 192, "head_dim": 32}, "phi3": {"hidden_size": 64, "head_dim": 32},
          "phi3-partial": {"hidden_size": 128, "head_dim": 32}, "gpt_bigcode": {"hidden_size": 128}}  # fmt: skip
PROMPTS = [list(range(3, 40)), [5, 9, 7] * 40, list(range(100, 180))]


def pairs_within_kinds(kinds: tuple[str, ...]) -> list[int]:
    """Layers of one kind, two by two: the second reads the first's."""
    sources, single = [], {}
    for layer, kind in enumerate(kinds):
        sources.append(single.pop(kind, layer))
        if sources[-1] == layer:
            single[kind] = layer
    return sources


def save(case: str, folder: Path) -> tuple[Path, list[int]]:
    shape = SHAPES.get(case, SHAPE)
    sources = pairs_within_kinds(shape_of(tiny_config(case, **shape).to_dict()).kinds)
    model = cla_model(case, sources, **shape)
    model.float().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder, sources


HYBRIDS = [case for case, (family, _) in CASES.items() if FAMILIES[family].state]


@pytest.mark.parametrize("case", HYBRIDS)
def test_hybrids_are_refused_with_the_reason(case: str, tmp_path: Path):
    model = cla_model(case, None, **SHAPE)
    model.float().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    found = run(tmp_path, tmp_path / "model", [PROMPTS], max_model_len=256)
    assert "layers have no attention" in found["error"] and "Serve it with transformers" in found["error"]


@pytest.mark.parametrize("case", [case for case in CASES if case not in HYBRIDS])
def test_served_as_transformers_computes_it(case: str, tmp_path: Path):
    folder, sources = save(case, tmp_path / "model")
    expected = greedy(folder, PROMPTS)
    found = run(tmp_path, folder, [PROMPTS], max_model_len=400, max_num_seqs=4, max_num_batched_tokens=64)
    assert "error" not in found, found["log"][-3000:]
    for ours, theirs in zip(expected, found["rounds"][0], strict=True):
        assert theirs["tokens"] == ours["tokens"]
        torch.testing.assert_close(torch.tensor(theirs["logprobs"]), torch.tensor(ours["logprobs"]), rtol=0, atol=1e-3)
    owners = len(set(sources))
    assert found["layers"] == len(sources) > owners
    assert f"cla-convert: {owners} of {len(sources)} layers keep" in found["log"]
    assert sum(number for number, _ in found["groups"]) == owners
    assert found["free"] == found["blocks"] - 1  # vLLM keeps one block for padding
