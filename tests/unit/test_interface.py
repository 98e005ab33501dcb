"""What a release of transformers calls the KV cache: both names work with shipped code, an unknown one is refused."""

import inspect
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from cla_convert.errors import InputError
from cla_convert.models import self_test
from cla_convert.models.classes import cla_classes, register
from cla_convert.models.families import FAMILIES
from cla_convert.models.family_code import NEWEST
from cla_convert.models.kinds import has_kv
from cla_convert.models.shape import shape_of, unshared
from tests.tiny import CASES, cla_model, tiny_config
from tests.unit.test_models import rounding

ONE_OF_EACH = {family: case for case, (family, _) in reversed(CASES.items())}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(1))


def shared_pair(family: str) -> list[int | None]:
    """A map with one consumer: the first two layers of the kind of the first that has keys and values."""
    shape = shape_of(tiny_config(ONE_OF_EACH[family]).to_dict())
    owner = shape.kv_layers[0]
    consumer = shape.kinds.index(shape.kinds[owner], owner + 1)
    return [owner if layer == consumer else own for layer, own in enumerate(unshared(shape.kinds))]


def tiny(family: str):
    return cla_model(ONE_OF_EACH[family], shared_pair(family))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_may_be_given_by_either_name(family, name, ids):
    """To the language model and to its decoder; the first part of the text is in the cache."""
    model = tiny(family).double()
    for part in (model, model.base_model):
        with torch.inference_mode():
            expected = part(ids, use_cache=False)[0][:, 16:]
            cache = DynamicCache(config=model.config)
            part(ids[:, :16], **{name: cache}, use_cache=True)
            found = part(ids[:, 16:], **{name: cache}, use_cache=True)[0]
        assert cache.get_seq_length() == 24
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=rounding(ONE_OF_EACH[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vllm_without_the_plugin_is_refused_unless_a_full_cache_is_asked_for(family, monkeypatch):
    """vLLM's backend sets this attention, whoever's the code is."""
    config, model = tiny(family).config, cla_classes(FAMILIES[family])["Model"]
    monkeypatch.setitem(AttentionInterface._global_mapping, "vllm", AttentionInterface()["sdpa"])
    config._attn_implementation = "vllm"
    with pytest.raises(RuntimeError, match=r"Nothing tells vLLM(.|\n)*--hf-overrides"):
        model(config)
    config.vllm_kv_cache = "full"
    model(config)
    del config.vllm_kv_cache
    config.kv_source_layers = unshared(shape_of(config.to_dict()).kinds)
    model(config)  # nobody shares: nothing is lost


def test_the_bounds_say_what_was_tested():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (bounds,) = [line for line in project["dependencies"] if line.startswith("transformers")]
    major, minor = map(int, NEWEST.split("."))
    assert bounds.endswith(f",<{major}.{minor + 1}")


def test_one_cache_is_enough(ids):
    model = tiny("llama").base_model
    with pytest.raises(ValueError, match="two names of one argument"):
        type(model).forward(model, ids, past_key_values=DynamicCache(), cache=DynamicCache())


def renamed(forward, new: str):
    """The same function as a release would have it that calls the cache `new`."""
    old = {"past_key_values", "cache", "layer_past"} & inspect.signature(forward).parameters.keys()

    def wrapper(self, *args, **kwargs):
        if new in kwargs:
            kwargs[next(iter(old))] = kwargs.pop(new)
        return forward(self, *args, **kwargs)

    parameters = [
        parameter.replace(name=new) if parameter.name in old else parameter
        for parameter in inspect.signature(forward).parameters.values()
    ]
    wrapper.__signature__ = inspect.Signature(parameters)
    return wrapper


@pytest.mark.parametrize("part", ["Attention", "DecoderLayer", "Model", "ForCausalLM"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformers_that_renames_the_cache_again_is_refused(family, part, monkeypatch):
    module = inspect.getmodule(cla_classes(FAMILIES[family])["Model"])
    ours = getattr(module, FAMILIES[family].class_name(part))
    parent = next(base for base in ours.__mro__ if "forward" in vars(base) and base.__module__ != ours.__module__)
    monkeypatch.setattr(parent, "forward", renamed(parent.forward, "kv_store"))
    with pytest.raises(RuntimeError, match=r"In transformers 5\.\d+.*KV cache"):
        tiny(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_by_an_unknown_name_is_never_ignored(family, ids):
    with pytest.raises((RuntimeError, TypeError), match="kv_store"):
        tiny(family)(ids, kv_store=DynamicCache())


def test_fewer_layers_on_request_can_be_saved_and_loaded_again(tmp_path, ids):
    register()
    cla_model("llama", [0, 0, 2, 2, 4, 4]).save_pretrained(tmp_path / "six")
    shorter = AutoModelForCausalLM.from_pretrained(tmp_path / "six", num_hidden_layers=3).eval()
    assert len(shorter.base_model.layers) == 3 and shorter.config.kv_source_layers == [0, 0, 2]
    shorter.save_pretrained(tmp_path / "three")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "three").eval()
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, shorter(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_reads_the_last_token_of_the_same_decoder(family, ids, tmp_path):
    register()
    model = tiny(family)
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, pad_token_id=1).eval()
    model.base_model.load_state_dict(classifier.base_model.state_dict())
    with torch.inference_mode():
        hidden = model.base_model(ids).last_hidden_state[:, -1]
        torch.testing.assert_close(classifier(ids).logits, classifier.score(hidden), rtol=1e-5, atol=1e-5)


@pytest.fixture
def afresh():
    """The self-test forgets what it found."""
    self_test._check.cache_clear()
    yield
    self_test._check.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_test_passes_on_the_installed_transformers_for_every_kind_of_layer(family, afresh):
    model = self_test.tiny_model(FAMILIES[family])
    kinds = shape_of(model.config.to_dict()).kinds
    sources = model.config.kv_source_layers
    readers = {kind for layer, kind in enumerate(kinds) if sources[layer] not in (layer, None)}
    assert readers == set(filter(has_kv, kinds))
    if any(kinds_of_case(case) - {"full_attention", "full_attention, no RoPE"} for case in cases_of(family)):
        assert any(kind.startswith("sliding") for kind in kinds)
    self_test.check_interface(FAMILIES[family].cla_type)


def cases_of(family: str) -> list[str]:
    return [case for case, (name, _) in CASES.items() if name == family]


def kinds_of_case(case: str) -> set[str]:
    return set(filter(has_kv, shape_of(tiny_config(case).to_dict()).kinds))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_bigcode"])
def test_the_self_test_refuses_a_transformers_with_another_name_for_the_cache(family, afresh, monkeypatch):
    attention = next(base for base in attention_of(family).__mro__ if base.__module__.startswith("transformers.models"))
    monkeypatch.setattr(attention, "forward", renamed(attention.forward, "kv_store"))
    with pytest.raises(InputError, match="transformers 5") as caught:
        self_test.check_interface(family)
    assert "KV cache" in str(caught.value) and "pip install" in str(caught.value)


def attention_of(family: str) -> type:
    module = inspect.getmodule(cla_classes(FAMILIES[family])["Model"])
    return getattr(module, FAMILIES[family].class_name("Attention"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_bigcode"])
def test_the_self_test_sees_a_cache_that_is_never_filled(family, afresh, monkeypatch):
    """As the code of earlier versions went on under transformers 5.24: no error, and no cache."""
    attention = attention_of(family)
    forward = attention.forward

    def without_cache(self, *args, **kwargs):
        kwargs.pop(self.cache_argument, None)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", without_cache)
    with pytest.raises(InputError, match="differ from those without"):
        self_test.check_interface(family)
