"""GGUF files of tiny models, read back: the same logits, or refused by the name of what cannot be read."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, quants

from cla_convert.conversion.inspect import inspect_model
from cla_convert.errors import InputError
from cla_convert.models.export import load_model
from cla_convert.models.fingerprint import fingerprint
from cla_convert.models.gguf_header import read_gguf_header
from cla_convert.models.gguf_source import _contents, dequantise
from cla_convert.models.source import resolve_source
from tests.gguf_files import save_gguf
from tests.previews import check_preview
from tests.tiny import source_model

PHI = {"num_attention_heads": 4, "num_key_value_heads": 2}
CASES = {
    "llama": {},
    "llama-biases": {"mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3": {"query_pre_attn_scalar": 8, "sliding_window_pattern": 6},
    "phi3": PHI | {"sliding_window": 8},
    "phi3-partial": PHI | {"tie_word_embeddings": False},
    "starcoder2": {"sliding_window": None, "tie_word_embeddings": True},
    "qwen2_moe": {"norm_topk_prob": False, "use_sliding_window": False},
    "qwen3_moe": {"norm_topk_prob": True},
    "nemotron": {},
}
IDS = torch.randint(2, 250, (1, 200), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def same(model, path):
    """The file, read by us, is the model."""
    assert inspect_model(str(path))["supported"] is True
    folder = resolve_source(str(path))
    wanted, found = logits(model), logits(load_model(folder, dtype="float32"))
    torch.testing.assert_close(found, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=1e-4)
    return json.loads((folder / "config.json").read_text())


def refused(path, name):
    """Not supported, and refused, by name."""
    reason = inspect_model(str(path))["reason"]
    assert reason is not None and name in reason
    with pytest.raises(InputError, match=name):
        resolve_source(str(path))


@pytest.mark.parametrize("case", CASES)
def test_every_architecture(case, tmp_path):
    model = source_model(case, **CASES[case])
    file = save_gguf(model, tmp_path / "m.gguf")
    check_preview(file, tmp_path / "run")
    same(model, file)


def test_a_nemotron_that_turns_all_channels(tmp_path):
    model = source_model("nemotron", partial_rotary_factor=1.0)
    assert same(model, save_gguf(model, tmp_path / "m.gguf"))["rope_parameters"]["partial_rotary_factor"] == 1.0


def test_multi_head_attention_that_names_no_kv_heads(tmp_path, monkeypatch):
    """As llama.cpp's converter writes it from a config.json without `num_key_value_heads`."""
    monkeypatch.setattr(GGUFWriter, "add_head_count_kv", lambda self, count: None)
    model = source_model("llama", num_key_value_heads=4)
    assert same(model, save_gguf(model, tmp_path / "m.gguf"))["num_key_value_heads"] == 4


def rope(kind, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


def llama3_factors(model, theta=10000.0):
    """What llama.cpp writes: frequencies without scaling over those with it."""
    frequencies = model.model.rotary_emb.inv_freq.numpy().astype(np.float32)
    plain = 1 / theta ** (np.arange(0, 2 * len(frequencies), 2, dtype=np.float32) / (2 * len(frequencies)))
    return {"rope_freqs.weight": (plain / frequencies).astype(np.float32)}


@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize(
    "scaling",
    [
        {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        {"factor": 3.5, "low_freq_factor": 1.5, "high_freq_factor": 6.0, "original_max_position_embeddings": 300},
    ],
    ids=["3.2", "3.1", "odd"],
)
def test_llama3_scaling_from_its_factors(scaling, head_dim, tmp_path):
    model = source_model("llama", head_dim=head_dim, **rope("llama3", **scaling))
    factors = llama3_factors(model)
    assert len(set(factors["rope_freqs.weight"])) > 1
    path = save_gguf(model, tmp_path / "m.gguf", extra=factors)
    if head_dim == 8 and scaling["factor"] == 3.5:  # one factor between the two ends does not determine a scaling
        refused(path, "rope_freqs.weight")
        return
    found = same(model, path)["rope_parameters"]
    if head_dim == 64:
        assert found["rope_type"] == "llama3" and found["factor"] == scaling["factor"]
        assert scaling["factor"] == 3.5 or found == scaling | {"rope_type": "llama3", "rope_theta": 10000.0}


def test_factors_of_one_and_of_one_size(tmp_path):
    model = source_model("llama")
    same(model, save_gguf(model, tmp_path / "one.gguf", extra={"rope_freqs.weight": np.ones(4)}))
    model = source_model("llama", **rope("linear", factor=2.0))
    same(model, save_gguf(model, tmp_path / "two.gguf", extra={"rope_freqs.weight": np.full(4, 2.0)}))


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("named", [True, False])
def test_linear_scaling(case, named, tmp_path):
    model = source_model(case, **rope("linear", factor=4.0))
    metadata = {"rope.scaling.factor": 4.0} | ({"rope.scaling.type": "linear"} if named else {})
    same(model, save_gguf(model, tmp_path / "m.gguf", metadata=metadata))


def test_gemma3_scales_its_full_layers_only(tmp_path):
    full = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    sliding = {"rope_type": "default", "rope_theta": 1e4}
    parameters = {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
    model = source_model("gemma3", **CASES["gemma3"], **parameters)
    metadata = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    same(model, save_gguf(model, tmp_path / "m.gguf", metadata=metadata))


@pytest.mark.parametrize("more", [{}, {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}, {"attn_factor": 0.9}])
def test_yarn(more, tmp_path):
    names = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    settings = {names[key]: value for key, value in more.items() if key in names}
    if "attn_factor" in more:
        settings["attention_factor"] = float(np.float32(0.9)) * (0.1 * math.log(4) + 1)
    parameters = rope("yarn", factor=4.0, original_max_position_embeddings=64, **settings)
    model = source_model("qwen2", **parameters)
    metadata = {"type": "yarn", "factor": 4.0, "original_context_length": 64, "finetuned": True, **more}
    path = save_gguf(model, tmp_path / "m.gguf", metadata={f"rope.scaling.{k}": v for k, v in metadata.items()})
    same(model, path)


def test_longrope(tmp_path):
    long, short = [1.0, 2.5, 4.0, 8.0], [1.0, 1.5, 2.0, 2.5]
    settings = dict(long_factor=long, short_factor=short, original_max_position_embeddings=64, factor=8.0)
    parameters = rope("longrope", attention_factor=1.25, **settings)
    model = source_model("phi3", **PHI, original_max_position_embeddings=64, **parameters)
    extra = {"rope_factors_long.weight": np.array(long), "rope_factors_short.weight": np.array(short)}
    metadata = {"rope.scaling.attn_factor": 1.25, "rope.scaling.original_context_length": 64}
    path = save_gguf(model, tmp_path / "m.gguf", metadata=metadata, extra=extra)
    same(model, path)
    one = save_gguf(model, tmp_path / "n.gguf", metadata=metadata, extra={"rope_factors_long.weight": np.array(long)})
    refused(one, "rope_factors_short.weight")


@pytest.mark.parametrize(
    ("case", "metadata", "extra", "name"),
    [
        ("llama", {"rope.scaling.type": "mystery"}, {}, "rope.scaling.type"),
        ("llama", {"rope.scaling.alpha": 2.0}, {}, "rope.scaling.alpha"),
        ("llama", {"rope.scaling.attn_factor": 1.5}, {}, "rope.scaling.attn_factor"),
        ("llama", {"attention.scale": 0.5}, {}, "llama.attention.scale"),
        ("llama", {"attention.value_length": 4}, {}, "llama.attention.value_length"),
        ("qwen2", {"rope.dimension_count": 4}, {}, "qwen2.rope.dimension_count"),
        ("llama", {"expert_count": 8}, {}, "llama.expert_count"),
        ("llama", {}, {"rope_freqs.weight": np.array([1.0, 7.0, 2.0, 5.0])}, "rope_freqs.weight"),
        ("llama", {}, {"rope_freqs.weight": np.ones(3)}, "rope_freqs.weight"),
        ("llama", {}, {"blk.0.attn_q_norm.weight": np.ones(8)}, "blk.0.attn_q_norm.weight"),
        ("llama", {}, {"blk.0.attn_sinks.weight": np.ones(4)}, "blk.0.attn_sinks.weight"),
        ("llama", {}, {"blk.1.attn_q.bias": np.ones(32)}, "blk.1.attn_q.bias"),
        ("llama", {}, {"blk.0.attn_q.bias": np.ones(32)}, "k_proj.bias"),
        ("qwen2", {}, {"blk.6.attn_q.weight": np.ones((32, 32))}, "blk.6.attn_q.weight"),
    ],
    ids=str,
)
def test_what_has_no_place_is_refused_by_name(case, metadata, extra, name, tmp_path):
    refused(save_gguf(source_model(case), tmp_path / "m.gguf", metadata=metadata, extra=extra), name)


def test_what_is_missing_is_refused_by_name(tmp_path):
    refused(save_gguf(source_model("llama"), tmp_path / "m.gguf", without="blk.3.ffn_down"), "layers.3.mlp.down_proj")


def test_the_same_file_is_the_same_model_whichever_transformers_reads_it(tmp_path, monkeypatch):
    file, found = save_gguf(source_model("llama"), tmp_path / "m.gguf"), set()
    for version in ("5.23.0", "5.99.0"):
        monkeypatch.setattr(transformers.configuration_utils, "__version__", version)
        (tmp_path / version).mkdir()
        dequantise(file, "digest", tmp_path / version)
        found.add(fingerprint(tmp_path / version))
    assert len(found) == 1


def test_quantised_blocks_are_where_the_header_says(tmp_path):
    from gguf import GGUFWriter

    values = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    writer = GGUFWriter(tmp_path / "q.gguf", "llama")
    kinds = [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.BF16, GGMLQuantizationType.F16]
    for kind in kinds:
        data = values.astype(np.float16) if kind == GGMLQuantizationType.F16 else quants.quantize(values, kind)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    header = read_gguf_header(tmp_path / "q.gguf")
    for kind in kinds:
        stored = values.astype(np.float16) if kind == GGMLQuantizationType.F16 else quants.quantize(values, kind)
        wanted = stored if kind == GGMLQuantizationType.F16 else quants.dequantize(stored, kind)
        np.testing.assert_array_equal(_contents(tmp_path / "q.gguf", header, kind.name), wanted.astype(np.float32))
