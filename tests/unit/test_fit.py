"""Tensors against the class that config.json names, from headers: refused by name, dropped with a warning, or right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config

from cla_convert.conversion.convert import convert
from cla_convert.conversion.inspect import inspect_model, render
from cla_convert.conversion.plan import Plan, make_plan
from cla_convert.errors import InputError
from cla_convert.models.checkpoint import INDEX, Checkpoint
from cla_convert.models.export import load_model
from cla_convert.models.fingerprint import fingerprint
from cla_convert.models.source import open_headers, resolve_source
from cla_convert.models.verify import verify_model
from tests.conftest import byte_tokenizer
from tests.launch import cla_anew
from tests.previews import check_preview
from tests.tiny import CASES, save_tiny, source_model

Tensors = dict[str, Tensor]
IDS = torch.randint(2, 250, (2, 40), generator=torch.Generator().manual_seed(0))


def change(folder: Path, weights: Callable[[Tensors], Tensors] = lambda t: t, drop: str = "", **settings: Any) -> Path:
    """Change tensors and config.json."""
    file, config = folder / "model.safetensors", folder / "config.json"
    new = {name: tensor.contiguous().clone() for name, tensor in weights(load_file(file)).items()}
    save_file(new, file, metadata={"format": "pt"})
    found = {key: value for key, value in json.loads(config.read_text()).items() if key != drop}
    config.write_text(json.dumps(found | settings))
    return folder


def plan_of(folder: Path, **options: Any) -> Plan:
    return make_plan(Checkpoint.open(folder), **{"sharing": "cla1", "init": "mean", **options})


def converted(folder: Path, out: Path, **options: Any) -> Path:
    """Converted with the identity map."""
    convert(plan_of(folder, **options), Checkpoint.open(folder), out)
    return out


def logits(folder: Path, dtype: str = "float32") -> Tensor:
    with torch.no_grad():
        return load_model(folder, dtype=dtype)(IDS, use_cache=False).logits


def same(folder: Path, out: Path) -> None:
    assert inspect_model(str(folder))["supported"] is True
    # A fused projection becomes three, which some processors sum in another order.
    torch.testing.assert_close(logits(converted(folder, out)), logits(folder), rtol=1e-4, atol=1e-4)


def refused(folder: Path, *names: str) -> None:
    """inspect says so, first of all; there is no plan."""
    found = inspect_model(str(folder))
    assert render(found).startswith("supported: no")
    with pytest.raises(InputError) as caught:
        plan_of(folder)
    for name in names:
        assert name in found["reason"] and name in str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_what_transformers_saves_fits(case, tmp_path):
    same(save_tiny(case, tmp_path / "m"), tmp_path / "out")


def without(end: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}


@pytest.mark.parametrize(
    ("case", "weights", "settings", "names"),
    [
        ("llama", lambda t: t, {"tie_word_embeddings": False}, ["lm_head.weight"]),
        ("llama", lambda t: t, {"attention_bias": True}, ["q_proj.bias"]),
        ("llama", lambda t: t, {"vocab_size": 264}, ["embed_tokens.weight", "[258, 32]", "[264, 32]"]),
        ("llama", lambda t: t, {"intermediate_size": 80}, ["mlp.down_proj.weight", "and 17 others"]),
        ("llama", without("4.mlp.down_proj.weight"), {}, ["model.layers.4.mlp.down_proj.weight"]),
        ("llama", without("model.norm.weight"), {}, ["model.norm.weight"]),
        ("qwen3", without("2.self_attn.k_norm.weight"), {}, ["model.layers.2.self_attn.k_norm.weight"]),
        ("phi3", without("2.mlp.gate_up_proj.weight"), {}, ["model.layers.2.mlp.gate_up_proj.weight"]),
        ("gpt_bigcode", without("wpe.weight"), {}, ["transformer.wpe.weight"]),
        (
            "mixtral",
            without("3.block_sparse_moe.experts.2.w1.weight"),
            {},
            ["model.layers.3.block_sparse_moe.experts.2.w1.weight"],
        ),
        ("qwen3_moe", lambda t: t, {"num_local_experts": 3}, ["experts"]),
    ],
    ids=lambda value: "weights" if callable(value) else str(value),
)
def test_missing_and_misshapen_tensors_are_refused_by_name(case, weights, settings, names, tmp_path):
    refused(change(save_tiny(case, tmp_path), weights, **settings), *names)


def test_a_layer_that_was_pruned_is_refused(tmp_path):
    def narrower(tensors: Tensors) -> Tensors:
        cut = {"gate_proj": slice(None, 48), "up_proj": slice(None, 48), "down_proj": (slice(None), slice(None, 48))}
        parts = {f"model.layers.2.mlp.{name}.weight": place for name, place in cut.items()}
        return {name: tensor[parts[name]] if name in parts else tensor for name, tensor in tensors.items()}

    refused(change(save_tiny("llama", tmp_path), narrower), "model.layers.2.mlp.down_proj.weight")


@pytest.mark.parametrize(
    ("case", "extra"),
    [
        ("llama", {"v_head.summary.weight": torch.ones(1, 32)}),
        ("llama", {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(32) for i in range(6)}),
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        ("phi3", {"model.layers.1.self_attn.qkv_proj.bias": torch.ones(32)}),
        ("gpt_bigcode", {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}),
    ],
    ids=["value head", "biases", "rotary table", "fused biases", "mask"],
)
def test_what_the_class_has_no_place_for_is_dropped(case, extra, tmp_path):
    folder = change(save_tiny(case, tmp_path / "m"), lambda tensors: tensors | extra)
    if "inv_freq" not in next(iter(extra)):  # transformers computes those: nobody misses them
        assert "dropped" in " ".join(plan_of(folder).warnings)
    same(folder, tmp_path / "out")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("case", ["llama", "phi3", "gpt_bigcode", "qwen3_moe"])
def test_a_base_model_is_stored_without_prefix(case, tmp_path):
    model = source_model(case, tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path / "base")
    assert not any(
        name.startswith(("model.", "transformer.")) for name in load_file(tmp_path / "base/model.safetensors")
    )
    same(tmp_path / "base", tmp_path / "out")


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "base_model.model."])
def test_a_wrapper_around_all_names_is_named(wrapper, tmp_path):
    folder = change(save_tiny("llama", tmp_path), lambda t: {wrapper + name: tensor for name, tensor in t.items()})
    refused(folder, f"'{wrapper}model.layers.0.self_attn.q_proj.weight'", "wrapper")


def test_of_two_sets_of_weights_the_one_that_transformers_loads(tmp_path):
    source_model("llama").save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert (tmp_path / "m" / INDEX).exists()
    source_model("llama", seed=9).save_pretrained(tmp_path / "single")
    (tmp_path / "single" / "model.safetensors").rename(tmp_path / "m" / "model.safetensors")
    assert "model.safetensors is read" in " ".join(plan_of(tmp_path / "m").warnings)
    same(tmp_path / "m", tmp_path / "out")


def test_of_shards_everything_is_read_as_transformers_does(tmp_path):
    folder = tmp_path / "m"
    source_model("llama").save_pretrained(folder, max_shard_size="20KB")
    index = json.loads((folder / INDEX).read_text())
    forgotten = next(name for name in index["weight_map"] if "layers.2" in name)
    del index["weight_map"][forgotten]
    (folder / INDEX).write_text(json.dumps(index))
    same(folder, tmp_path / "out")
    shards = sorted(folder.glob("model-*.safetensors"))
    first = load_file(shards[0])
    save_file(load_file(shards[1]) | first, shards[1], metadata={"format": "pt"})
    with pytest.raises(InputError, match="both hold"):
        Checkpoint.open(folder)


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "adapter_config.json").write_text("{}")
    for path in (folder, tmp_path / "alone"):
        with pytest.raises(InputError, match="Merge it first"):
            resolve_source(str(path))
        with pytest.raises(InputError, match="Merge it first"):
            inspect_model(str(path))


def test_weights_under_another_name_are_refused(tmp_path):
    refused(change(save_tiny("llama", tmp_path), transformers_weights="other.safetensors"), "other.safetensors")


@pytest.mark.parametrize("settings", [{"max_new_tokens": -1}, {"cache_implementation": "nonsense"}])
def test_a_generation_config_that_transformers_refuses_is_refused(tmp_path: Path, settings: Any):
    folder = save_tiny("llama", tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(Exception, match=r"max_new_tokens|nonsense"):
        AutoModelForCausalLM.from_pretrained(folder)
    refused(folder, "generation_config.json")


def test_what_a_generation_config_ignores_is_no_news_of_inspect(tmp_path: Path):
    folder = save_tiny("llama", tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    done = cla_anew("inspect", folder)  # transformers says it once a process
    assert done.returncode == 0 and "generation flags" not in done.stderr, done.stderr


def test_null_is_no_quantisation(tmp_path):
    for case in ("llama", "phi3"):
        same(change(save_tiny(case, tmp_path / case), quantization_config=None), tmp_path / f"{case}-out")


def test_mixed_dtypes_stay_unless_one_is_asked_for(tmp_path):
    def mixed(tensors: Tensors) -> Tensors:
        return {name: t if "norm" in name else t.to(torch.bfloat16) for name, t in tensors.items()}

    folder = change(save_tiny("llama", tmp_path / "m"), mixed, dtype="bfloat16")
    kinds = {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}
    assert set(kinds.values()) == {torch.bfloat16, torch.float32}
    stored = load_file(converted(folder, tmp_path / "kept") / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == kinds
    assert torch.equal(logits(tmp_path / "kept"), logits(folder))
    pooled = converted(folder, tmp_path / "pooled", sharing="cla2")
    stored = load_file(pooled / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {name: kinds[name] for name in stored}
    stored = load_file(converted(folder, tmp_path / "asked", dtype="float16") / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


@pytest.mark.parametrize("case", ["glm4_moe", "ernie4_5_moe", "hy_v3", "exaone_moe", "lfm2_moe", "dots1", "solar_open"])
def test_what_transformers_keeps_in_float32_does_so_in_any_dtype(case, tmp_path):
    """Biases by which experts are chosen: rounded to bfloat16, these are all 8."""
    generator = torch.Generator().manual_seed(3)

    def near_eight(tensors: Tensors) -> Tensors:
        chosen = {n: t for n, t in tensors.items() if n.endswith(("e_score_correction_bias", "expert_bias"))}
        assert chosen
        return tensors | {n: 8 + 1e-3 * torch.randn(t.shape, generator=generator) for n, t in chosen.items()}

    folder = change(save_tiny(case, tmp_path / "m"), near_eight)
    out = converted(folder, tmp_path / "out", dtype="bfloat16")
    assert torch.equal(logits(out, "bfloat16"), logits(folder, "bfloat16"))
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    kept = {name for name in after if after[name].dtype == torch.float32}
    assert kept and kept < after.keys() and all(torch.equal(after[name], before[name]) for name in kept)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_weights_that_the_asked_dtype_cannot_hold_are_refused(name, tmp_path):
    folder = change(save_tiny("llama", tmp_path / "m"), lambda t: t | {name: t[name] + 3e5})
    with pytest.raises(InputError, match=r"layers\.[01]\..* is not finite in float16"):
        converted(folder, tmp_path / "out", dtype="float16", sharing="cla2")
    assert not (tmp_path / "out").exists()
    converted(folder, tmp_path / "wider", dtype="bfloat16", sharing="cla2")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rope_parameters": {"rope_type": "linaer", "rope_theta": 1e4, "factor": 4.0}}, "linaer"),
        ({"pad_token_id": 300}, "adding_idx"),
        ({"hidden_act": "sillu"}, "sillu"),
        ({"vocab_size": "many"}, "'vocab_size': TypeError"),
    ],
    ids=str,
)
def test_a_config_that_transformers_does_not_accept_is_refused(settings, reason, tmp_path):
    folder = change(save_tiny("llama", tmp_path), **settings)
    refused(folder, reason)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(folder)


def test_layers_that_guess_further_ahead_are_left_out(tmp_path):
    """As published GLM-4.5 has them: behind the last layer, where transformers looks for nothing."""

    def with_another(tensors: Tensors) -> Tensors:
        last = {name: t for name, t in tensors.items() if name.startswith("model.layers.5.")}
        return tensors | {name.replace(".5.", ".6.", 1): t for name, t in last.items()}

    folder = change(save_tiny("glm4_moe", tmp_path / "m"), with_another, num_nextn_predict_layers=1)
    same(folder, tmp_path / "out")
    assert not [name for name in Checkpoint.open(tmp_path / "out").tensors if name.startswith("model.layers.6.")]
    refused(change(folder, num_nextn_predict_layers=0), "layer 6")


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("qwen3_next", ["mtp.fc.weight", "mtp.layers.0.self_attn.k_proj.weight"]),
        ("ernie4_5", ["model.mtp_linear_proj.0.weight", "model.mtp_block.0.self_attn.k_proj.weight"]),
    ],
)
def test_what_guesses_further_ahead_is_left_out_and_this_is_said_once(case, names, tmp_path):
    """As published Qwen3-Next and ERNIE 4.5 with experts have it, under names of its own."""
    folder = change(save_tiny(case, tmp_path / "m"), lambda tensors: tensors | {n: torch.ones(4, 4) for n in names})
    byte_tokenizer().save_pretrained(folder)
    same(folder, tmp_path / "out")
    assert not [name for name in Checkpoint.open(tmp_path / "out").tensors if "mtp" in name]
    plan = plan_of(folder)
    (said,) = [warning for warning in plan.warnings if "mtp" in warning]
    assert "2 tensors that guess tokens further ahead" in said and min(names) in said
    assert plan.render().count("guess tokens further ahead") == 1
    assert plan.to_json()["left_out"] == [said]
    assert verify_model(tmp_path / "out")["ok"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_an_output_is_told_where_no_logit_shows_it(value, tmp_path):
    """A token that hardly anybody writes."""

    def damage(tensors: Tensors) -> Tensors:
        tensors["model.embed_tokens.weight"][7, 3] = value
        return tensors

    folder = save_tiny("llama", tmp_path / "m", tie_word_embeddings=False)
    convert(plan_of(folder, sharing="cla2"), Checkpoint.open(folder), tmp_path / "out")
    change(tmp_path / "out", damage)
    with pytest.raises(InputError) as refused:
        verify_model(tmp_path / "out")
    assert "Failed: all weights are finite (" in str(refused.value)
    assert "NaN or infinity in model.embed_tokens.weight" in str(refused.value)


def test_mistral_with_kinds_of_layers_is_ministral(tmp_path):
    """As transformers loads it: some layers see all of the text (40 tokens), others 8."""
    folder = save_tiny("mistral-window", tmp_path / "m")
    sliding = logits(folder)
    same(change(folder, layer_types=["full_attention", "sliding_attention"] * 3), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "cla_ministral"
    assert not torch.allclose(logits(folder), sliding)
    same(change(folder, layer_types=None), tmp_path / "none")


def test_an_attention_that_is_not_here_falls_back(tmp_path, capsys):
    folder = change(save_tiny("llama", tmp_path / "m"), _attn_implementation="flash_attention_2")
    same(folder, tmp_path / "out")
    assert "flash_attention_2" in capsys.readouterr().err
    assert "flash" not in (tmp_path / "out" / "config.json").read_text()


def test_config_and_fingerprint_stay_as_they_were(tmp_path):
    from cla_convert.conversion.skeleton import Skeleton

    scaling = {"type": "linear", "factor": 4.0}
    folder = change(
        save_tiny("llama", tmp_path / "m"), drop="rope_parameters", rope_theta=10000.0, rope_scaling=scaling
    )
    checkpoint = Checkpoint.open(folder)
    before, config = fingerprint(checkpoint.folder), json.dumps(checkpoint.config)
    plan_of(folder)
    make_plan(checkpoint, sharing="cla2", init="mean")
    Skeleton(checkpoint, checkpoint.config, IDS, torch.device("cpu"))
    assert json.dumps(checkpoint.config) == config and fingerprint(checkpoint.folder) == before
    assert json.loads((converted(folder, tmp_path / "out") / "config.json").read_text())["rope_scaling"] == scaling


def test_packed_experts_are_dequantised_as_transformers_does(tmp_path, monkeypatch):
    """GPT-OSS as published: blocks of 32 numbers of four bits with a scale each (MXFP4)."""
    monkeypatch.setenv("CLA_CONVERT_CACHE", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)

    def pack(tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            if not name.endswith(("gate_up_proj", "down_proj")):
                found[name] = tensor.to(torch.bfloat16)
                continue
            experts, inputs, outputs = tensor.shape
            blocks = (experts, outputs, inputs // 32)
            found[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8, generator=generator)
            found[f"{name}_scales"] = torch.randint(118, 124, blocks, dtype=torch.uint8, generator=generator)
        return found

    settings = {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    folder = change(save_tiny("gpt_oss", tmp_path / "m", intermediate_size=32), pack, **settings)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    assert inspect_model(str(folder))["supported"] is True
    check_preview(folder, tmp_path / "run")
    source = resolve_source(str(folder))
    assert open_headers(str(folder)).tensors.keys() == Checkpoint.open(source).tensors.keys()
    assert Checkpoint.open(source).origin["quantization"] == "MXFP4 experts"
    for name, parameter in model.named_parameters():
        if "experts" in name:
            assert torch.equal(Checkpoint.open(source).read(name), parameter.to(torch.bfloat16)), name
    lacking = change(Path(shutil.copytree(folder, tmp_path / "lacking")), without("2.mlp.experts.down_proj_scales"))
    for reads in (open_headers, resolve_source):
        with pytest.raises(InputError, match=r"layers\.2\.mlp\.experts\.down_proj_blocks has no scales"):
            reads(str(lacking))
    same(source, tmp_path / "out")


def test_an_adapter_alone_names_its_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(InputError, match="changes a model that is not in the folder: org/base"):
        resolve_source(str(tmp_path))
