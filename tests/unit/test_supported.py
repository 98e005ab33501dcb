"""What `inspect` says of checkpoints that do not fit together is what `convert` refuses, from headers alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cla_convert.conversion.inspect import inspect_model
from cla_convert.conversion.plan import make_plan
from cla_convert.errors import InputError
from cla_convert.models.checkpoint import Checkpoint
from tests.tiny import save_tiny


def change(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refused(folder: Path) -> dict[str, Any]:
    """What inspect says, which is why there is no plan."""
    found = inspect_model(str(folder))
    with pytest.raises(InputError) as caught:
        make_plan(Checkpoint.open(folder), sharing="cla2", init="mean")
    assert found["supported"] is False and found["patterns"] == {}
    assert found["reason"].startswith(caught.value.what)
    return found


@pytest.mark.parametrize(
    ("case", "settings", "reason"),
    [
        ("llama", {"num_hidden_layers": 8}, "Layer 6 has no q_proj"),
        ("llama", {"num_hidden_layers": 4}, "has a layer 5 where config.json promises 4"),
        ("llama", {"num_key_value_heads": 4}, "16 rows where config.json promises 32"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ("phi3", {"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ("gemma3", {"layer_types": ["full_attention"] * 3}, "3 layers, not of 6"),
        ("gemma3", {"layer_types": ["full_attention", "chunked_attention"] * 3}, "'chunked_attention'"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_weights(case, settings, reason, tmp_path):
    folder = save_tiny(case, tmp_path)
    assert inspect_model(str(folder))["supported"] is True
    change(folder, settings)
    assert reason in refused(folder)["reason"]


@pytest.mark.parametrize(("dtype", "bytes_per_token"), [("float32", 768), ("bfloat16", 384)])
def test_the_cache_of_packed_weights_is_not_packed(dtype, bytes_per_token, tmp_path):
    folder = save_tiny("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    packed = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights.items()}
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder, {"dtype": dtype})
    found = refused(folder)
    assert "quantised" in found["reason"] and found["dtype"] == "F8_E4M3"
    assert found["kv_bytes_per_token"] == bytes_per_token
