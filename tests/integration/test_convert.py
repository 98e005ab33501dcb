"""`cla-convert convert`, `inspect` and `verify` through the command line on tiny checkpoints."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import export_model, load_model
from cla_convert.models.headers import TensorInfo
from cla_convert.models.writer import ShardWriter, read_manifest
from tests.conftest import save_tiny_llama
from tests.launch import cla
from tests.tiny import save_tiny


def convert(source: Path, out: Path, *options) -> dict:
    done = cla("convert", source, out, "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def logits(folder: Path, ids: torch.Tensor | None = None) -> torch.Tensor:
    if ids is None:
        ids = torch.randint(2, 258, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return load_model(folder, dtype=torch.float32)(ids).logits


def test_help_imports_nothing_heavy():
    heavy = ("torch", "transformers", "datasets", "lm_eval", "numpy")
    script = (
        "import sys, contextlib; sys.argv = ['cla-convert', '--help']\n"
        "from cla_convert.cli import main\n"
        "with contextlib.suppress(SystemExit): main()\n"
        f"print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    assert "uptrain" in done.stdout and "..." not in done.stdout.split("Commands:")[1]


@pytest.mark.parametrize("init", ["first", "mean"])
def test_convert_pools_keeps_and_drops(tmp_path, init, tiny_llama):
    result = convert(tiny_llama, tmp_path / "out", "--sharing", "cla2-keep-ends", "--init", init)
    assert result["kv_source_layers"] == [0, 1, 1, 3, 3, 5]
    assert result["kv_bytes_per_token"] == {"before": 6 * 2 * 2 * 8 * 4, "after": 4 * 2 * 2 * 8 * 4}
    assert {"output", "sharing", "init", "parameters", "seconds", "peak_rss_bytes"} <= result.keys()
    source, out = load_file(tiny_llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in source.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        is_kv = "k_proj" in name or "v_proj" in name
        if is_kv and layer in (2, 4):
            assert name not in out
        elif is_kv and layer in (1, 3) and init == "mean":
            other = source[name.replace(f".{layer}.", f".{layer + 1}.")]
            torch.testing.assert_close(out[name], (tensor + other) / 2, rtol=0, atol=0)
        else:
            assert torch.equal(out[name], tensor), name
    assert result["parameters"]["after"] == sum(tensor.numel() for tensor in out.values())
    for sidecar in ("tokenizer.json", "tokenizer_config.json", "LICENSE", "generation_config.json"):
        assert (tmp_path / "out" / sidecar).read_bytes() == (tiny_llama / sidecar).read_bytes()


def test_identity_map_reproduces_the_source_exactly(tmp_path, tiny_llama):
    convert(tiny_llama, tmp_path / "out", "--sharing", "cla1")
    assert torch.equal(logits(tmp_path / "out"), logits(tiny_llama))


def test_equal_layers_pool_without_loss(tmp_path):
    """Where the members of every group already have equal projections, sharing them changes nothing but the input."""
    folder = save_tiny_llama(tmp_path / "source")
    model = LlamaForCausalLM.from_pretrained(folder)
    layers = model.model.layers
    for owner, consumer in ((1, 2), (3, 4)):
        for name in ("self_attn.k_proj", "self_attn.v_proj"):
            layers[consumer].get_submodule(name).load_state_dict(layers[owner].get_submodule(name).state_dict())
        layers[consumer].input_layernorm.load_state_dict(layers[owner].input_layernorm.state_dict())
        torch.nn.init.zeros_(layers[owner].self_attn.o_proj.weight)  # the owner adds nothing: both see one input
        torch.nn.init.zeros_(layers[owner].mlp.down_proj.weight)
    model.save_pretrained(folder)
    for init in ("first", "mean"):
        convert(folder, tmp_path / init, "--sharing", "cla2-keep-ends", "--init", init)
        torch.testing.assert_close(logits(tmp_path / init), logits(folder), rtol=1e-5, atol=1e-5)


def test_sharded_sources_biases_and_shards_out(tmp_path):
    source = save_tiny_llama(tmp_path / "source", max_shard_size="20KB", attention_bias=True, dtype="bfloat16")
    convert(
        source,
        tmp_path / "out",
        "--sharing",
        "cla3",
        "--init",
        "mean",
        "--max-shard-size",
        "20KB",
        "--dtype",
        "float32",
    )
    checkpoint, original = Checkpoint.open(tmp_path / "out"), Checkpoint.open(source)
    assert len({info.file for info in checkpoint.tensors.values()}) > 3
    assert {info.dtype for info in checkpoint.tensors.values()} == {"F32"}
    names = [f"model.layers.{i}.self_attn.k_proj.bias" for i in (3, 4, 5)]
    pooled = torch.stack([original.read(name) for name in names]).mean(0)
    torch.testing.assert_close(checkpoint.read(names[0]), pooled)
    assert logits(tmp_path / "out").isfinite().all()


def test_for_converting_alone_no_text_to_train_on_is_sampled(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setenv("CLA_CONVERT_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {sources: [{generate: {length: 64}}], held_out: 0.1}\n"
        "train: {tokens: 200k, sequence_length: 64, batch_tokens: 1024, validation_tokens: 128}\n"
        "convert: {init: calibrated, calibration: {tokens: 1024, sequence_length: 64, steps: 1}}\n"
    )
    convert(tiny_llama, tmp_path / "out", "--recipe", recipe)
    sampled = sum(np.load(file)["ids"].size for file in tmp_path.rglob("*.npz"))
    assert 1024 < sampled < 20_000
    assert read_manifest(tmp_path / "out")["calibration"]["tokens"] == 1024


def test_calibrated_beats_mean_and_reports_its_groups(tmp_path, tiny_llama):
    """On the byte-level toy model: closer to the source's distribution, from text alone, and the same every time."""
    small = ["--set", "convert.calibration={tokens: 2048, sequence_length: 128}"]
    results = [convert(tiny_llama, tmp_path / f"c{i}", "--init", "calibrated", *small) for i in range(2)]
    convert(tiny_llama, tmp_path / "mean", "--init", "mean")
    ids = torch.tensor([list(b"The same text that any English reader would expect to see here.")]) + 2
    logs = {name: logits(folder, ids).log_softmax(-1) for name, folder in
            {"source": tiny_llama, "calibrated": tmp_path / "c0", "mean": tmp_path / "mean"}.items()}  # fmt: skip
    kl = {
        name: (logs["source"].exp() * (logs["source"] - logs[name])).sum(-1).mean() for name in ("calibrated", "mean")
    }
    assert kl["calibrated"] < 0.7 * kl["mean"]
    for name, info in Checkpoint.open(tmp_path / "c0").tensors.items():
        first, second = (Checkpoint.open(tmp_path / f"c{i}").read(name) for i in range(2))
        assert torch.equal(first, second), (name, info)
    groups = {tuple(group["layers"]): group for group in results[0]["groups"]}
    assert {"head_permutation", "captured_k", "captured_v", "damage"} <= groups[(1, 2)].keys()
    assert sorted(groups[(1, 2)]["head_permutation"]["2"]) == [0, 1]
    assert groups[(0,)].keys() == {"layers"}


def test_what_stays_is_copied_without_being_in_memory(tmp_path, tiny_llama):
    peaks = []
    for name, rows in (("small", 1000), ("large", 3_125_000)):
        source = shutil.copytree(tiny_llama, tmp_path / name)
        checkpoint = Checkpoint.open(tiny_llama)
        (source / "config.json").write_text(json.dumps(checkpoint.config | {"vocab_size": rows}))
        embedding = "model.embed_tokens.weight"
        infos = checkpoint.tensors | {embedding: TensorInfo("", "F32", (rows, 32))}
        writer = ShardWriter(source, infos, max_shard_size=10**9)
        for tensor in checkpoint.tensors.keys() - {embedding}:
            writer.add(tensor, checkpoint.read(tensor))
        peaks.append(convert(source, tmp_path / f"{name}-out", "--init", "mean")["peak_rss_bytes"])
    assert (tmp_path / "large-out" / "model.safetensors").stat().st_size > 400_000_000
    assert peaks[1] < peaks[0] + 50_000_000


def test_dry_run_writes_nothing_and_draws_the_map(tmp_path, tiny_llama):
    done = cla("convert", tiny_llama, tmp_path / "out", "--dry-run", "--init", "mean")
    assert done.returncode == 0
    assert "[0] [1 ← 2] [3 ← 4] [5]" in done.stdout
    assert "4 pooled, 4 dropped" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_output_loads_where_cla_convert_is_not_installed(tmp_path, tiny_llama):
    convert(tiny_llama, tmp_path / "out", "--init", "mean")
    done = cla("verify", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ok"]
    assert result["module"].startswith("transformers_modules")
    assert result["cached_layers"] == 4

    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights.pop("model.layers.0.self_attn.k_proj.weight")
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    done = cla("verify", tmp_path / "out")
    assert done.returncode == 3
    assert "no weights missing" in done.stderr


def test_export_of_a_trained_model_round_trips(tmp_path, tiny_llama):
    convert(tiny_llama, tmp_path / "converted", "--init", "mean")
    model = load_model(tmp_path / "converted", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    export_model(model, tmp_path / "converted", tmp_path / "trained", manifest={"tokens": 5})
    ids = torch.arange(2, 22)[None]
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / "trained")(ids).logits, model(ids).logits)
    assert json.loads((tmp_path / "trained" / "cla_manifest.json").read_text())["tokens"] == 5
    assert cla("verify", tmp_path / "trained").returncode == 0


def test_inspect(tiny_llama):
    result = json.loads(cla("inspect", tiny_llama, "--json").stdout)
    assert result["supported"] is True
    assert (result["num_layers"], result["num_attention_heads"], result["num_key_value_heads"]) == (6, 4, 2)
    assert result["kv_bytes_per_token"] == 6 * 2 * 2 * 8 * 4
    assert result["kv_source_layers"] == list(range(6))
    assert result["patterns"]["cla2"]["kv_bytes_per_token"] * 2 == result["kv_bytes_per_token"]
    said = cla("inspect", tiny_llama).stdout.splitlines()
    assert result["kv_head_counts"] == [1]
    assert "KV cache    768 bytes per token in float32" in said
    assert "--kv-heads  1: 2x smaller, with any of these patterns or alone (cla1)" in said
    assert "            to be tried before cla3 (docs/sharing.md, Fewer KV heads)" in said
    (default,) = [line for line in said if "(default)" in line]
    assert default.split() == ["cla2-keep-ends", "4", "512", "1.50x", "(default)"]
    assert max(len(line) for line in said if "MiB" not in line and str(tiny_llama) not in line) <= 80
    # 768 and 512 bytes per token, 8192 tokens, 32 contexts
    assert "at 32 contexts of 8192 tokens: 192.0 MiB -> 128.0 MiB of KV cache with cla2-keep-ends" in said
    assert said[-1] == f"next        cla-convert convert {tiny_llama} OUT"


def test_inspect_says_what_training_takes_on_so_many_gpus(tmp_path):
    wide = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128, "vocab_size": 32768}
    source = save_tiny_llama(tmp_path / "wide", **wide)
    line = ["inspect", source, "--training", "--gpus", "8,1", "--set", "train.micro_batch_size=4"]
    told = json.loads(cla(*line, "--json").stdout)["training"]
    assert told["micro_batch_size"] == 4 and len(told["memory"]) == 12  # one GPU divides nothing
    found = {
        (one["gpus"], one["parameters"], one["activation_checkpointing"], one["teacher"]): one["bytes_per_gpu"]
        for one in told["memory"]
    }
    assert found[8, "all", False, "whole"] < found[1, "all", False, "whole"]
    assert found[8, "all", True, "whole"] < found[8, "all", False, "whole"]
    assert found[1, "attention", False, "whole"] < found[1, "all", False, "whole"]
    said = cla(*line).stdout.splitlines()
    row = next(line for line in said if line.split()[:3] == ["all", "kept", "sharded"])
    assert row.split()[3:] == ["-", f"{found[8, 'all', False, 'sharded'] / 2**30:.1f}"]
    assert said[-1].startswith("next")
    no_teacher = json.loads(cla(*line, "--set", "train.loss=cross_entropy", "--json").stdout)["training"]["memory"]
    assert len(no_teacher) == 8 and not any(one["parts"]["teacher"] for one in no_teacher)
    assert cla("inspect", source, "--gpus", "8").returncode == 2
    assert cla("inspect", source, "--training", "--gpus", "0").returncode == 2


def test_inspect_counts_a_sliding_window_once(tmp_path):
    """Two sliding layers of window 32 and a full one (gemma3): beyond the window only the full ones grow."""
    source = save_tiny("gemma3", tmp_path / "gemma")
    result = json.loads(cla("inspect", source, "--json").stdout)
    early, late = result["kv_bytes_per_token"], result["kv_bytes_per_token_beyond_window"]
    window = result["sliding_window"]
    assert late < early and window < 8192
    mib = 32 * (early * window + late * (8192 - window)) / 2**20
    assert f"at 32 contexts of 8192 tokens: {mib:.1f} MiB -> " in cla("inspect", source).stdout


def test_verify_says_that_a_source_is_none_of_ours(tiny_llama):
    done = cla("verify", tiny_llama)
    assert done.returncode == 3 and "is not a converted model" in done.stderr


@pytest.mark.parametrize("options", [(), ("--cache",)], ids=str)
def test_verify_says_that_an_adapter_is_beside_the_model(tmp_path, tiny_llama, options):
    convert(tiny_llama, tmp_path / "out", "--sharing", "cla2", "--init", "mean")
    (tmp_path / "out" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    done = cla("verify", tmp_path / "out", *options)
    assert done.returncode == 3 and "holds an adapter" in done.stderr and "report a bug" not in done.stderr


def test_multi_head_attention_is_converted_with_a_warning(tmp_path):
    source = save_tiny_llama(tmp_path / "mha", num_key_value_heads=4)
    done = cla("convert", source, tmp_path / "out", "--init", "mean")
    assert done.returncode == 0
    assert "multi-head attention" in done.stderr and "GQA" in done.stderr
    grouped = cla("convert", source, tmp_path / "grouped", "--init", "mean", "--kv-heads", "2", "--sharing", "cla2")
    assert "(4.00x smaller)" in grouped.stderr and "multi-head attention" not in grouped.stderr
    card = (tmp_path / "grouped" / "README.md").read_text()
    assert "# mha-cla2-kv2\n" in card and "with 2 KV heads a layer instead of 4" in card and "4.00x smaller" in card


def test_stored_rotary_frequencies_are_dropped_and_quantised_weights_refused(tmp_path):
    source = save_tiny_llama(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # Llama-1 era checkpoints
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "out", "--init", "mean")
    assert not [name for name in Checkpoint.open(tmp_path / "out").tensors if "inv_freq" in name]

    weights["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(4, dtype=torch.uint8)  # bitsandbytes
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    done = cla("convert", source, tmp_path / "refused", "--dtype", "bfloat16")
    assert done.returncode == 3 and "quantised" in done.stderr


def test_broken_weights_are_refused_by_every_verb(tmp_path):
    source = save_tiny_llama(tmp_path / "source")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    for verb in (["inspect", source], ["convert", source, tmp_path / "out"], ["eval", source, "--limit", "1"]):
        done = cla(*verb)
        assert done.returncode == 3 and "not a whole safetensors file" in done.stderr, verb
        assert "Traceback" not in done.stderr


def test_code_of_the_source_is_never_run_and_never_asked_about(tmp_path):
    source = save_tiny_llama(tmp_path / "source")
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (source / "config.json").write_text(json.dumps(config))
    done = cla("convert", source, tmp_path / "out", "--init", "mean")
    assert done.returncode == 0, done.stderr
    assert "which is not run" in done.stderr and "[y/N]" not in done.stderr
    assert not (tmp_path / "out" / "evil.py").exists()
    assert logits(source).isfinite().all() and logits(tmp_path / "out").isfinite().all()

    config |= {"model_type": "evil", "architectures": ["EvilForCausalLM"]}
    (source / "config.json").write_text(json.dumps(config))
    done = cla("convert", source, tmp_path / "refused")
    assert done.returncode == 3 and "EvilForCausalLM" in done.stderr and "Supported: llama" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["convert", "{model}x", "{out}"], 3, "Did you mean 'llama'"),
        (["convert", "{model}", "{out}", "--sharing", "[0,2,2,3,4,5]"], 2, "Layer 1 cannot read layer 2"),
        (["convert", "{model}", "{out}", "--sharing", "cla2-keepends"], 2, "Did you mean"),
        (["convert", "{model}", "{out}", "--init", "average"], 2, "'first'"),
        (["convert", "{model}", "{out}", "--kv-heads", "3"], 2, "2 KV heads cannot become 3"),
        (["convert", "{model}", "{out}", "--kv-heads", "0"], 2, "--kv-heads: must be 1 or more"),
        (["convert", "{model}", "{model}"], 3, "not empty"),
        (["convert", "{model}", "{model}", "--overwrite"], 3, "not written by cla-convert"),
        (["convert", "{model}"], 2, "Missing argument"),
        (["convert", "{model}", "{out}", "--sahring", "cla2"], 2, "--sharing"),
        (["run", "demo", "--out", "{out}", "--set", "train.tokns=5"], 2, "Did you mean 'tokens'"),
        (["run", "demo", "--out", "{out}", "--until", "evla"], 2, "Did you mean 'eval'"),
        (["report", "{model}"], 3, "not a run folder"),
        (["verify", "{out}"], 3, "There is no folder"),
    ],
    ids=lambda value: " ".join(value[:2] + value[3:]) if isinstance(value, list) else None,
)
def test_mistakes_are_explained_and_lose_nothing(tmp_path, tiny_llama, arguments, code, message):
    before = sorted(file.name for file in tiny_llama.iterdir())
    done = cla(*[argument.format(model=tiny_llama, out=tmp_path / "out") for argument in arguments])
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()
    assert sorted(file.name for file in tiny_llama.iterdir()) == before


def test_auto_measures_once_and_stays_within_the_budget(tmp_path, tiny_llama):
    small = ["--set", "convert.calibration={tokens: 768, sequence_length: 64}", "--sharing", "auto"]
    first = convert(tiny_llama, tmp_path / "a", *small, "--kv-budget", "0.5")
    assert first["kv_bytes_per_token"]["after"] <= 0.5 * first["kv_bytes_per_token"]["before"]
    winner, *others = first["auto"]["finalists"]
    assert first["kv_source_layers"] == winner["kv_source_layers"]
    assert others and all(winner["kl"] <= other["kl"] for other in others)
    again = cla("convert", tiny_llama, tmp_path / "b", *small, "--kv-budget", "0.7", "--dry-run")
    assert "done before" in again.stderr and "* chosen" in again.stdout and "4 of 6 layers own" in again.stdout
    refused = cla("convert", tiny_llama, tmp_path / "c", "--kv-budget", "0.5")
    assert refused.returncode == 2 and "sharing: auto" in refused.stderr
