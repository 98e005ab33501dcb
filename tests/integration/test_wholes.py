"""Models that see images, through the command line: calibrated, uptrained, verified, exported."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.verify import measure_cache, verify_models
from tests.launch import LENGTH, cla, prepare
from tests.unit.test_wholes import TEXT, load_whole, save_whole
from tests.wholes import CASES, shown


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Case -> a folder with source/, converted/ and a text."""
    made = {}
    for case in CASES:
        made[case] = tmp_path_factory.mktemp(case)
        save_whole(case, made[case] / "source")
        prepare(made[case], made[case] / "source")
    return made


def test_outputs_load_where_cla_convert_is_not_installed(sources):
    results = verify_models([folder / "converted" for folder in sources.values()])
    for case, result in zip(sources, results, strict=True):
        assert result["ok"] and "ForConditionalGeneration" in auto_map(sources[case])["AutoModelForCausalLM"]


def auto_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "converted" / "config.json").read_text())["auto_map"]


def test_uptraining_puts_the_language_model_back_into_the_whole(sources, tmp_path):
    case = "qwen3_vl"
    folder, calibrated, out = sources[case], tmp_path / "calibrated", tmp_path / "out"
    recipe, settings = folder / "recipe.yaml", ["--set", f"train.sequence_length={LENGTH}"]
    done = cla("convert", folder / "source", calibrated, "--recipe", recipe, "--init", "calibrated")
    assert done.returncode == 0, done.stderr
    assert "inside      Qwen3-VL" in done.stderr
    done = cla("uptrain", calibrated, out, "--recipe", recipe, "--tokens", 8 * LENGTH, *settings)
    assert done.returncode == 0, done.stderr
    before, after = load_file(calibrated / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    others = Checkpoint.open(out).others
    assert len(others) > 5 and all(torch.equal(before[name], after[name]) for name in others)
    assert all(not torch.equal(before[name], after[name]) for name in before if "k_proj" in name and name not in others)
    whole, trained = load_whole(calibrated), load_whole(out)
    with torch.inference_mode():
        for seen in ({"input_ids": TEXT}, shown(case, whole)):
            assert not torch.equal(whole(**seen).logits, trained(**seen).logits)
    done = cla("verify", out, "--cache", "--beside", folder / "source")
    assert done.returncode == 0, done.stderr


def test_the_language_model_alone_where_it_is_asked_for(sources, tmp_path):
    folder = sources["qwen3_vl"]
    done = cla("convert", folder / "source", tmp_path / "out", "--init", "mean", "--text-only")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "cla_qwen3" and config["architectures"] == ["ClaQwen3ForCausalLM"]
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names and all(name.startswith(("model.layers.", "model.embed", "model.norm", "lm_head")) for name in names)


def test_the_cache_is_the_owners(sources):
    for case in ("llava", "qwen2_5_vl"):
        found = measure_cache(sources[case] / "converted", sources[case] / "source")
        assert found["saved"] == 2, case
