"""Models that see images: the language model inside converts, and the output is the whole model again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from cla_convert.conversion.convert import convert
from cla_convert.conversion.inspect import inspect_model, render
from cla_convert.conversion.plan import make_plan
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import export_model, load_model
from cla_convert.models.whole_rows import WHOLES
from cla_convert.report.model_card import write_first_card
from tests.conftest import byte_tokenizer
from tests.wholes import CASES, shown, whole_model

ROUNDED = {"llava-phi3", "qwen3_5_moe"}
"""Sums in another order: of one fused projection, and of experts in some releases of transformers."""
TEXT = torch.arange(2, 26)[None]


def save_whole(case, folder: Path):
    """The model, and its folder as people have it."""
    model = whole_model(case)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"do_resize": false}')
    return model


def converted(source: Path, out: Path, sharing: str) -> Checkpoint:
    checkpoint = Checkpoint.open(source)
    convert(make_plan(checkpoint, sharing=sharing, init="mean"), checkpoint, out)
    return checkpoint


def load_whole(folder: Path):
    """As anybody would, from the code in the folder."""
    found: Any = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    loaded, info = found
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return loaded.eval()


def assert_alike(language, whole):
    """The language model alone makes of text what the whole makes of it."""
    scale = getattr(language.config, "logit_scale", None) or 1  # transformers' Aya Vision leaves it out
    found, wanted = language(TEXT).logits / scale, whole(TEXT).logits
    assert torch.allclose(found, wanted, atol=1e-5 * wanted.abs().max())


def test_what_sees_images_is_not_looked_at_when_a_training_is_published(tmp_path):
    """Outputs of earlier versions can hold a NaN there, where no training comes."""
    save_whole("gemma3", tmp_path / "source")
    name = min(converted(tmp_path / "source", tmp_path / "out", "cla2").others)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    stored[name].view(-1)[0] = float("nan")
    save_file(stored, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    model = load_model(tmp_path / "out", dtype=torch.float32)
    export_model(model, template=tmp_path / "out", out=tmp_path / "trained")
    found = load_file(tmp_path / "trained" / "model.safetensors")
    assert torch.equal(found.pop(name).isnan(), stored.pop(name).isnan())
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items()) and found.keys() == stored.keys()


def test_every_row_has_a_case():
    assert {case.whole for case in CASES.values()} == WHOLES.keys()


@pytest.mark.parametrize("case", CASES)
def test_whole(case, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    model = save_whole(case, source)
    seen = shown(case, model)
    checkpoint = converted(source, out, "cla1")
    same = load_whole(out)
    with torch.inference_mode():
        for given in (seen, {"input_ids": TEXT}):
            found, wanted = same(**given).logits, model(**given).logits
            assert torch.equal(found, wanted) or (case in ROUNDED and torch.allclose(found, wanted, atol=1e-5))
        changed = {**seen, "pixel_values": seen["pixel_values"] + 1}
        assert not torch.allclose(same(**changed).logits, model(**seen).logits)
        assert_alike(load_model(source, dtype=torch.float32), model)
    assert len(checkpoint.others) > 5
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in checkpoint.others)
    assert (out / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_whole_that_shares(case, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    seen = shown(case, save_whole(case, source))
    converted(source, out, "cla2")
    model, config = load_whole(out), Checkpoint.open(out).config
    ids, more = seen.pop("input_ids"), torch.arange(40, 46)[None]
    whole_text = {**seen, "input_ids": torch.cat([ids, more], 1)}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in seen:
            whole_text[name] = torch.cat([seen[name], torch.zeros_like(more)], 1)
    with torch.inference_mode():
        full = model(**whole_text, use_cache=False).logits[:, -more.shape[1] :]
        cache = model(input_ids=ids, **seen, use_cache=True).past_key_values
        steps = [model(input_ids=one[None], past_key_values=cache, use_cache=True).logits for one in more.T]
        assert_alike(load_model(out, dtype=torch.float32), model)
        assert torch.allclose(torch.cat(steps, 1), full, atol=1e-4 * full.abs().max())
    sources = config["kv_source_layers"]
    held = [getattr(layer, "keys", None) is not None and layer.keys.numel() > 0 for layer in cache.layers]
    assert held == [layer == owner for layer, owner in enumerate(sources)] and not all(held)


def rewritten(folder: Path, names: dict[str, str], **config: Any) -> None:
    """The same weights and settings as somebody else stores them."""
    weights = load_file(folder / "model.safetensors")
    for old, new in names.items():
        weights = {name.replace(old, new, 1) if name.startswith(old) else name: w for name, w in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    settings = json.loads(file.read_text()) | config
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("gemma3", {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."}),
        ("llava", {"language_model.": "model.language_model.", "model.language_model.lm_head": "lm_head"}),
        ("qwen2_5_vl", {"model.language_model.": "model.", "model.visual.": "visual."}),
    ],
)
def test_names_by_which_others_store_them(case, names, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    model = save_whole(case, source)
    seen = shown(case, model)
    stored = load_file(source / "model.safetensors").keys()
    text = json.loads((source / "config.json").read_text())["text_config"]
    if case == "qwen2_5_vl":  # as published: one level, and nothing by the name of `text_config`
        rewritten(source, {}, **{key: value for key, value in text.items() if key != "model_type"}, text_config=None)
        names = {old: new for old, new in names.items() if any(name.startswith(old) for name in stored)}
    rewritten(source, {old: new for old, new in names.items() if any(name.startswith(old) for name in stored)})
    converted(source, out, "cla1")
    with torch.inference_mode():
        assert torch.equal(load_whole(out)(**seen).logits, model(**seen).logits)
    assert load_file(out / "model.safetensors").keys() == load_file(source / "model.safetensors").keys()


def test_what_text_config_leaves_out_is_what_transformers_assumes(tmp_path):
    """LLaVA 1.5 as published says little more of its language model than that it is a Llama."""
    save_whole("llava", tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    told = {key: value for key, value in text.items() if key not in ("rms_norm_eps", "hidden_act", "attention_bias")}
    rewritten(tmp_path, {}, text_config=told)
    config = Checkpoint.open(tmp_path).config
    assert (config["rms_norm_eps"], config["hidden_act"]) == (1e-6, "silu")


def test_a_whole_that_transformers_would_not_find_in_the_files_is_refused(tmp_path):
    """Of a tensor of the tower, and of names that this model is never stored under."""
    save_whole("qwen3_vl", tmp_path)
    rewritten(tmp_path, {"model.visual.merger.norm.": "model.visual.mergers.norm."})
    assert "model.visual.merger.norm.bias" in inspect_model(str(tmp_path))["reason"]
    rewritten(
        tmp_path, {"model.visual.mergers.": "model.visual.merger.", "model.language_model.": "language_model.model."}
    )
    found = inspect_model(str(tmp_path))
    assert not found["supported"] and "Qwen3VLForConditionalGeneration" in found["reason"]


def test_inspect_names_the_whole(tmp_path):
    save_whole("qwen3_vl", tmp_path)
    found = inspect_model(str(tmp_path))
    assert found["supported"] and found["model_type"] == "qwen3" and found["whole"]["model_type"] == "qwen3_vl"
    weights = load_file(tmp_path / "model.safetensors")
    others = [weight for name, weight in weights.items() if ".visual." in name]
    assert (found["whole"]["tensors"], found["whole"]["parameters"]) == (len(others), sum(w.numel() for w in others))
    assert "inside      Qwen3-VL (qwen3_vl)" in render(found)


def test_a_language_model_of_no_supported_family_is_refused(tmp_path):
    save_whole("llava", tmp_path)
    rewritten(tmp_path, {}, text_config={"model_type": "opt", "hidden_size": 32})
    found = inspect_model(str(tmp_path))
    assert not found["supported"] and "'opt'" in found["reason"]


def test_the_card_says_how_the_whole_is_loaded(tmp_path):
    save_whole("gemma3", tmp_path / "source")
    checkpoint = Checkpoint.open(tmp_path / "source")
    result = convert(make_plan(checkpoint, sharing="cla2", init="mean"), checkpoint, tmp_path / "out")
    card = write_first_card(tmp_path / "out", result, tmp_path / "source").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card and "pipeline_tag: image-text-to-text" in card


def test_what_guesses_further_ahead_is_left_out_of_a_whole_too(tmp_path):
    save_whole("qwen3_5", tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    save_file(load_file(file) | {"mtp.fc.weight": torch.ones(4, 4)}, file, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path / "source")
    plan = make_plan(checkpoint, sharing="cla2", init="mean")
    assert "mtp.fc.weight" in plan.left_out[0]
    convert(plan, checkpoint, tmp_path / "out")
    assert "mtp.fc.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    load_whole(tmp_path / "out")
