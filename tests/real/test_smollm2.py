"""The properties of the CLA code on a real checkpoint, and the pipeline through the command line."""

import json
import shutil

import pytest
import torch

from cla_convert.conversion.sharing import sharing_map
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import load_model, load_tokenizer
from tests.integration.test_convert import convert
from tests.launch import cla, cla_anew
from tests.real.conftest import MODEL

KEEP_ENDS = sharing_map("cla2-keep-ends", ["full_attention"] * 30)


@pytest.fixture(scope="module")
def ids(smollm2) -> torch.Tensor:
    text = "Cross-layer attention lets neighbouring layers share their keys and values, which halves the cache."
    return load_tokenizer(smollm2)(text, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "converted"
    result = convert(MODEL, out, "--init", "mean")
    assert result["kv_source_layers"] == KEEP_ENDS
    assert result["kv_bytes_per_token"] == {"before": 46080, "after": 24576}
    return out


def test_gguf_is_dequantised_with_its_origin(smollm2):
    checkpoint = Checkpoint.open(smollm2)
    assert checkpoint.origin["quantization"] == "Q4_1"
    assert checkpoint.origin["license"] == "apache-2.0"
    assert {info.dtype for info in checkpoint.tensors.values()} == {"F32"}
    assert "quantization_config" not in checkpoint.config


def test_the_source_knows_its_capitals(smollm2):
    model, tokenizer = load_model(smollm2), load_tokenizer(smollm2)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])


def test_identity_map_is_the_source_exactly(tmp_path, smollm2, ids):
    convert(smollm2, tmp_path / "identity", "--sharing", "cla1")
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / "identity")(ids).logits, load_model(smollm2)(ids).logits)


def test_cached_uncached_stepwise_static_and_backends_agree(converted, ids):
    model = load_model(converted, dtype=torch.float32)
    with torch.inference_mode():
        full = model(ids, use_cache=False).logits
        assert torch.equal(model(ids, use_cache=True).logits, full)
        cache, steps = None, []
        for i in range(ids.shape[1]):
            out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        rounding = 1e-3 * full.abs().max().item()
        torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=rounding)

        states = [state for layer in cache.layers for state in (layer.keys, layer.values) if state is not None]
        assert sum(state.numel() * state.element_size() for state in states) == 24576 * ids.shape[1]

        greedy = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        tokens = ids
        for _ in range(6):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(model.generate(ids, **greedy), tokens)
        static = model.generate(ids, **greedy, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, tokens)

        for implementation in ("eager", "flex_attention"):
            model.set_attn_implementation(implementation)
            torch.testing.assert_close(model(ids).logits, full, rtol=0, atol=rounding)


def test_gradients_do_not_depend_on_activation_checkpointing(converted, ids):
    model = load_model(converted, dtype=torch.float32).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_loads_without_cla_convert(converted):
    done = cla("verify", converted, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cached_layers"] == 16


@pytest.mark.timeout(3600)  # ten to twenty minutes, by the processor
def test_the_whole_pipeline_resumes_and_reports(tmp_path):
    """`cla-convert run` on a tiny budget: stop half-way, continue, report; nothing finished is done twice."""
    line = ["run", "demo", "--out", tmp_path / "run", "--set", "train.tokens=2048", "--set", "eval.limit=2"]
    line += ["--set", "convert.calibration={tokens: 2048, sequence_length: 256}"]
    line += ["--set", "train.validation_tokens=512", "--set", "eval.tasks=[piqa,wikitext]"]
    line += ["--set", "eval.limits={wikitext: 1}"]
    done = cla_anew(*line, "--until", "convert")  # with all cores
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "run" / "converted" / "model.safetensors").stat().st_mtime_ns
    done = cla_anew(*line)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "converted" / "model.safetensors").stat().st_mtime_ns == made

    report = json.loads((tmp_path / "run" / "report.json").read_text())
    kv = report["kv"]
    assert kv["bytes_per_token_before"] == kv["measured_bytes_per_token_before"] == 46080
    assert kv["bytes_per_token_after"] == kv["measured_bytes_per_token_after"] == 24576
    assert kv["measured_bytes_before"] * 16 == kv["measured_bytes_after"] * 30
    assert report["train"]["tokens"] == 2048
    assert {"before", "converted", "after"} <= report["tasks"]["piqa"]["acc"].keys()
    held_out = next(point for name, point in report["perplexity"].items() if "held" in name)
    assert held_out["before"] < held_out["after"] < held_out["converted"]
    assert report["verdict"]
    markdown = (tmp_path / "run" / "report.md").read_text()
    assert "piqa" in markdown and done.stdout.startswith("Verdict")
    assert cla("verify", tmp_path / "run" / "uptrained").returncode == 0
    card = (tmp_path / "run" / "uptrained" / "README.md").read_text()
    assert "apache-2.0" in card and "cross-layer-attention" in card

    (tmp_path / "run" / "report.json").unlink()
    assert cla("report", tmp_path / "run").returncode == 0
    assert (tmp_path / "run" / "report.json").exists()

    changed = cla(*line, "--set", "train.learning_rate=1e-5")
    assert changed.returncode == 2 and "train.learning_rate" in changed.stderr
    shutil.rmtree(tmp_path / "run")
