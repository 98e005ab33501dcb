"""What `inspect` says of checkpoints that do not fit together is what `convert` refuses, from headers alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from cla_convert.conversion.convert import convert
from cla_convert.conversion.inspect import inspect_model, render
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


SHARING = {"num_hidden_layers": 10, "num_kv_shared_layers": 4, "vocab_size_per_layer_input": 64,
           "hidden_size_per_layer_input": 8,
           "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2}  # fmt: skip
SIZES = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "num_attention_heads": 4, "head_dim": 8,
         "num_key_value_heads": 2, "pad_token_id": None}  # fmt: skip


@pytest.mark.parametrize("part", [False, True], ids=["alone", "a part"])
@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("gemma3n_text", {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 10}),
        ("gemma4_text", {"global_head_dim": 16}),
    ],
)
def test_models_that_share_as_published(model_type, more, part, tmp_path):
    """Who reads whom is what transformers does, and the bytes are those of its cache; also with what sees images."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **SHARING, **more))
    model.save_pretrained(tmp_path)
    cache = model(torch.arange(2, 12)[None], use_cache=True).past_key_values
    held = [sum(t.nbytes for t in (layer.keys, layer.values) if t is not None) for layer in cache.layers]
    if part:
        weights = load_file(tmp_path / "model.safetensors")
        renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in weights.items()}
        save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        text = json.loads((tmp_path / "config.json").read_text())
        whole = {"model_type": model_type.removesuffix("_text"), "text_config": text}
        (tmp_path / "config.json").write_text(json.dumps(whole))
    found = refused(tmp_path)
    assert found["kv_source_layers"] == [0, 1, 2, 3, 4, 5, 5, 5, 5, 4]
    assert found["kv_bytes_per_token"] == sum(held) / 10 and not any(held[6:])
    assert found["shares"]["left"] == {"sharing": "cla2-keep-ends", "kv_layers": 5}
    said = render(found)
    assert "6 of 10 layers keep K/V; others read theirs: 4 (by 9), 5 (by 6-8)" in said and "leave 5: 1.20x" in said
    assert "The nearest supported family is gemma" in found["reason"]


def test_a_converted_model_says_what_it_shares(tmp_path):
    """Layers 0 and 5 alone, 1 and 3 with one reader each."""
    source = Checkpoint.open(save_tiny("llama", tmp_path / "source"))
    convert(make_plan(source, sharing="cla2-keep-ends", init="mean"), source, tmp_path / "out")
    found = refused(tmp_path / "out")
    assert found["shares"]["groups"] == [[1, 2], [3, 4]] and found["shares"]["kv_layers"] == 4
    assert "already" in found["reason"]
    assert inspect_model(str(tmp_path / "source"))["shares"] is None
