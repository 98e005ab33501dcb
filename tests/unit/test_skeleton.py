"""The model without its layers."""

import copy
from pathlib import Path

import pytest
import torch

from cla_convert.conversion import skeleton
from cla_convert.conversion.skeleton import Skeleton
from cla_convert.models.checkpoint import Checkpoint


def test_the_sources_config_stays_as_it_was(tiny_llama: Path):
    """transformers writes `rope_type` and `rope_theta` into the `rope_scaling` that it is given."""
    checkpoint = Checkpoint.open(tiny_llama)
    config = {key: value for key, value in checkpoint.config.items() if key != "rope_parameters"}
    config |= {"rope_theta": 10_000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    before = copy.deepcopy(config)
    Skeleton(checkpoint, config, torch.arange(2, 10)[None], torch.device("cpu"))
    assert config == before


def test_embeddings_are_read_in_blocks_of_the_vocabulary(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(skeleton, "_ROWS", 7)
    checkpoint, tokens = Checkpoint.open(tiny_llama), torch.tensor([[2, 9, 200, 57, 6, 7], [257, 2, 13, 14, 0, 0]])
    found = Skeleton(checkpoint, checkpoint.config, tokens, torch.device("cpu")).embed(tokens)
    assert torch.equal(found, checkpoint.read("model.embed_tokens.weight")[tokens])
