"""The model without its layers."""

import copy
from pathlib import Path

import torch

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
