"""The family table against transformers itself: sizes, kinds of layers, names of tensors, code that ships."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)
from transformers.cache_utils import get_layer_types_and_kwargs

from cla_convert.conversion.sharing import groups_of, sharing_map
from cla_convert.errors import InputError
from cla_convert.models import families_page
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.classes import cla_classes
from cla_convert.models.export import load_model
from cla_convert.models.families import CODE_FOLDER, FAMILIES, REFUSED, family_of
from cla_convert.models.family import Family
from cla_convert.models.generate import render
from cla_convert.models.kinds import NOPE, SLIDING
from cla_convert.models.shape import shape_of
from cla_convert.models.source import open_headers, resolve_source
from cla_convert.models.whole_rows import INNER
from tests.tiny import CASES, cla_model, save_tiny, source_model, tiny_config

SIZES = {"num_hidden_layers": 30, "num_attention_heads": 8, "hidden_size": 256}
CONFIGS = [
    *({"model_type": family} for family in FAMILIES),
    {"model_type": "mistral", "sliding_window": None},
    {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 21},
    {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768},
    {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 128},
    {"model_type": "gemma3_text", "sliding_window_pattern": 4, "sliding_window": 512},
    {"model_type": "gemma3_text", "layer_types": ["full_attention", "sliding_attention"] * 15},
    {"model_type": "phi3", "sliding_window": 2047},
    {"model_type": "mixtral", "sliding_window": 4096},
    {"model_type": "qwen3_moe", "use_sliding_window": True},
    {"model_type": "qwen2_moe", "use_sliding_window": True, "max_window_layers": 21},
    {"model_type": "ministral", "layer_types": ["full_attention", "sliding_attention"] * 15},
    {"model_type": "ministral3", "sliding_window": 4096},
    {"model_type": "olmo3", "layer_types": ["full_attention", "sliding_attention"] * 15},
    {"model_type": "cohere2", "sliding_window_pattern": 5},
    {"model_type": "exaone4", "sliding_window_pattern": 5, "sliding_window": 128},
    {"model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 30},
    {"model_type": "starcoder2", "sliding_window": 4096},
    {"model_type": "smollm3", "no_rope_layer_interval": 5},
    {"model_type": "smollm3", "no_rope_layers": [0, 1] * 15, "use_sliding_window": True, "sliding_window": 64},
]
"""config.json as older and newer versions of transformers wrote them: what is left out is left to the defaults."""


def rotating_layers(config) -> list[bool]:
    """Which layers have RoPE, as transformers' attention decides it."""
    if config.model_type == "cohere2" or (
        config.model_type in ("exaone4", "exaone_moe") and config.sliding_window is not None
    ):
        return [kind == SLIDING for kind in config.layer_types]
    return [bool(rope) for rope in getattr(config, "no_rope_layers", [True] * config.num_hidden_layers)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_shape_and_kinds_are_those_of_transformers(config):
    ours = config | SIZES
    for key, name in FAMILIES[config["model_type"]].keys.items():
        ours[name] = ours.pop(key)
    shape, theirs = shape_of(ours), AutoConfig.for_model(**ours)
    layer_types, cache_arguments = get_layer_types_and_kwargs(theirs)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (shape.num_layers, shape.num_attention_heads, shape.hidden_size) == (30, 8, 256)
    assert (shape.num_key_value_heads, shape.head_dim) == (theirs.num_key_value_heads or 8, head_dim)
    assert [kind.removesuffix(NOPE) for kind in shape.kinds] == layer_types
    assert [not kind.endswith(NOPE) for kind in shape.kinds] == rotating_layers(theirs)
    for kind, arguments in zip(shape.kinds, cache_arguments, strict=True):
        assert arguments.get("sliding_window") == (shape.sliding_window if kind.startswith(SLIDING) else None)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_default_pattern_halves_every_kind(config):
    config = config | SIZES | {"n_layer": 30, "n_head": 8, "n_embd": 256}
    shape = shape_of(config)
    kinds, attending = shape.kinds, shape.kv_layers
    groups = groups_of(sharing_map("cla2-keep-ends", kinds))
    assert all(len({kinds[layer] for layer in group}) == 1 for group in groups)
    assert len(groups) <= 16 + len(set(kinds))
    assert groups[0] == attending[:1] and groups[-1] == attending[-1:]


@pytest.mark.parametrize("case", CASES)
def test_names_of_the_table_are_those_of_the_models(case):
    """Every parameter of a layer has a place, and the attention has nothing that the table does not name."""
    family = FAMILIES[CASES[case][0]]
    places = {name: family.place(name) for name, _ in cla_model(case, None).named_parameters()}
    attention = {name: place for name, place in places.items() if place and place.module}
    assert {place.layer for place in places.values() if place} == set(range(tiny_config(case).num_hidden_layers))
    assert {place.module for place in attention.values()} == set(family.attention_modules)
    assert all(family.tensor(*place) == name for name, place in attention.items())


@pytest.mark.parametrize("case", ["phi3", "gpt_bigcode"])
def test_fused_projections_are_read_as_three(case, tmp_path):
    family = FAMILIES[CASES[case][0]]
    folder = save_tiny(case, tmp_path)
    split, stored = Checkpoint.open(folder), Checkpoint.open(folder, as_stored=True)
    fused = {name for name in stored.tensors if name not in split.tensors}
    assert {family.place(name).module for name in fused} == {family.fused}
    for name in fused:
        layer, _, part = family.place(name)
        blocks = [split.read(family.tensor(layer, module, part)) for module in ("q_proj", "k_proj", "v_proj")]
        assert torch.equal(torch.cat(blocks), source_model(case).state_dict()[name])
    assert sum(info.nbytes for info in split.tensors.values()) == sum(i.nbytes for i in stored.tensors.values())

    (folder / "config.json").write_text((folder / "config.json").read_text().replace('_heads": 2', '_heads": 1'))
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('n_head": 4', 'n_head": 2'))
    with pytest.raises(InputError, match="rows where config.json promises"):
        Checkpoint.open(folder)


VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
SEEING = {
    "gemma3": (Gemma3ForConditionalGeneration, Gemma3Config),
    "mistral": (Mistral3ForConditionalGeneration, Mistral3Config),
    "ministral3": (Mistral3ForConditionalGeneration, Mistral3Config),
    "qwen3_5": (Qwen3_5ForConditionalGeneration, Qwen3_5Config),
}


@pytest.mark.parametrize("published", [True, False], ids=["published", "saved by transformers"])
@pytest.mark.parametrize("case", SEEING)
def test_the_language_model_of_one_that_sees_images(case, published, tmp_path, monkeypatch):
    monkeypatch.setenv("CLA_CONVERT_CACHE", str(tmp_path / "cache"))
    text = tiny_config(case).to_diff_dict()
    torch.manual_seed(0)
    whole, config = SEEING[case]
    model = whole(config(text_config=text, vision_config=VISION, tie_word_embeddings=case != "mistral")).eval()
    model.save_pretrained(tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    other = {"language_model.model.": "model.language_model."}
    if any(name.startswith("model.language_model.") for name in weights) == published:
        other = dict(map(reversed, other.items())) if published else other
        for old, new in other.items():
            weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
        save_file(weights, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "whole" / "preprocessor_config.json").write_text("{}")
    headers, folder = open_headers(str(tmp_path / "whole")), resolve_source(str(tmp_path / "whole"), text_only=True)
    assert not (folder / "preprocessor_config.json").exists()
    assert "transformers_version" not in (folder / "config.json").read_text()
    assert headers.tensors.keys() == Checkpoint.open(folder).tensors.keys()
    assert ("lm_head.weight" in headers.tensors) == (case == "mistral")
    assert shape_of(headers.config) == shape_of(tiny_config(case).to_dict())
    ids = torch.arange(2, 22)[None]
    with torch.inference_mode():
        assert torch.equal(load_model(folder, dtype=torch.float32)(ids).logits, model(ids).logits)


CODE = [*FAMILIES.values(), *(inner.code for inner in INNER.values())]


@pytest.mark.parametrize("family", CODE, ids=[family.model_type for family in CODE])
def test_shipped_code_is_what_the_templates_make(family):
    for path, text in render(family).items():
        assert path.read_text() == text, "run `python -m cla_convert.models.generate`"


def test_the_page_is_the_table():
    page = Path(__file__).parents[2] / "docs" / "families.md"
    told = "run: python -m cla_convert.models.families_page > docs/families.md"
    assert page.read_text(encoding="utf-8") == families_page.page(), told
    assert families_page.NOTES.keys() == FAMILIES.keys()


def test_no_shipped_code_is_without_a_family():
    made = {path for family in CODE for path in family.code_files}
    assert set(CODE_FOLDER.glob("*_cla_*.py")) == made


CODE = [*FAMILIES.values(), *(inner.code for inner in INNER.values())]


@pytest.mark.parametrize("family", CODE, ids=[family.model_type for family in CODE])
def test_shipped_code_is_as_vllm_reads_it(family):
    """One literal get_interface, one call of what it returns, `scaling=self...`; the model spells its arguments out."""
    tree = ast.parse(family.code_files[1].read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    forward = {
        name: next(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "forward")
        for name, node in classes.items()
        if name in (family.class_name("Attention"), family.class_name("Model"))
    }
    calls = [node for node in ast.walk(forward[family.class_name("Attention")]) if isinstance(node, ast.Call)]
    assert [ast.unparse(call.func) for call in calls].count("ALL_ATTENTION_FUNCTIONS.get_interface") == 1
    (interface,) = [call for call in calls if ast.unparse(call.func) == "attention_interface"]
    scaling = next(keyword.value for keyword in interface.keywords if keyword.arg == "scaling")
    assert ast.unparse(scaling).startswith("self.")
    arguments = {argument.arg for argument in forward[family.class_name("Model")].args.args}
    assert {"input_ids", "position_ids", "inputs_embeds", "attention_mask", "past_key_values", "cache"} <= arguments
    for file in family.code_files:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {module.split(".")[0] for module in modules} <= {"torch", "transformers", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "falcon", "architectures": ["FalconForCausalLM"]}, "code of its own"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "modelling code for each family"),
        ({"model_type": "gpt_bigcode", "multi_query": False}, "interleaves the heads"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "both directions"),
        ({"model_type": "cla_qwen3"}, "hide how much was lost"),
        *(({"model_type": name}, reason[:20]) for name, reason in REFUSED.items()),
    ],
    ids=str,
)
def test_refusals_say_why_and_what_is_supported(config, reason):
    with pytest.raises(InputError, match=reason) as caught:
        family_of(config)
    if config["model_type"] not in FAMILIES and not config["model_type"].startswith("cla_"):
        first, rest = [*FAMILIES][:8], len(FAMILIES) - 8
        assert caught.value.fix == f"Supported: {', '.join(first)} and {rest} more (docs/families.md)."


@pytest.mark.parametrize(
    ("model_type", "nearest", "obstacle"),
    [
        ("olmo_hybrid", "olmo2", "of another class in transformers"),
        ("bamba", "llama", "keep a state"),
        ("glm4v", "glm4", "a part of one that reads more than text"),
        ("granitemoehybrid", "granitemoe", "an MLP and experts at once"),
        ("llama4_text", "llama", "attend within chunks"),
        ("hunyuan_v1_moe", "hunyuan_v1_dense", "different numbers of experts"),
        ("mistral4", "mistral", "multi-head latent attention"),
        ("minimax", "minimax_m2", "are linear_attention"),
        ("gpt2", "gpt_bigcode", "comparing the two"),
        ("gemma3n_text", "gemma3_text", "takes an attention and a model of its own"),
        ("stablelm", "llama", "rotates a part of each head by itself"),
    ],
)
def test_the_nearest_family_and_what_is_between(model_type, nearest, obstacle):
    """From what transformers itself writes into config.json."""
    with pytest.raises(InputError) as caught:
        family_of(AutoConfig.for_model(model_type).to_dict())
    assert f"nearest supported family is {nearest}" in caught.value.why and obstacle in caught.value.why


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_a_configuration_of_defaults_can_be_made(family: Family) -> None:
    """Some versions of transformers compare a config with one when they save or show it."""
    assert cla_classes(family)["Config"]().model_type == family.cla_type
