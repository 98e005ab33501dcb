"""RoPE that depends on the length of a text, settled for one length: what transformers computes of such a text."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cla_convert.serving.rope import settle_frequencies
from tests.tiny import cla_model

TRAINED, LONG = 16, 48
ROPE: dict[str, Any] = {"rope_theta": 1e4, "original_max_position_embeddings": TRAINED}
LONGROPE = ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
DYNAMIC = ROPE | {"rope_type": "dynamic", "factor": 4.0}
CASES = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 64, "head_dim": 8, "hidden_size": 16,
                          "original_max_position_embeddings": TRAINED}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": TRAINED}),
}  # fmt: skip


def model_with(kind: str) -> PreTrainedModel:
    case, settings = CASES[kind]
    return cla_model(case, [0, 0, 2, 2, 4, 4], **settings)


@torch.inference_mode()
def logits(model: PreTrainedModel, ids: torch.Tensor, chunk: int | None = None) -> torch.Tensor:
    """Of all tokens; read in chunks as a server does, if a size is given."""
    if chunk is None:
        return model(ids, use_cache=False).logits
    cache, found = None, []
    for part in ids.split(chunk, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("length", [TRAINED, LONG])
def test_a_text_of_that_length_is_as_in_transformers_and_its_parts_too(kind: str, length: int):
    ids = torch.arange(3, 3 + length)[None]
    model = model_with(kind)
    expected = logits(model, ids)
    assert length == TRAINED or (logits(model, ids, 8) - expected).abs().max() > 0.1  # what is wrong otherwise
    model = model_with(kind)
    assert settle_frequencies(model, length) == [kind]
    torch.testing.assert_close(logits(model, ids), expected)
    torch.testing.assert_close(logits(model, ids, 8), expected, rtol=1e-4, atol=1e-4)


def test_other_kinds_are_left_alone():
    model = cla_model("gemma3", None)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert settle_frequencies(model, 1000) == []
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
