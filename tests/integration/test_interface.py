"""A transformers that the shipped code does not fit: refused before any work; models published with older code."""

import pytest
from transformers.models.llama.modeling_llama import LlamaAttention

from cla_convert.cli import app
from cla_convert.errors import ExitCode, InputError
from cla_convert.files import read_json
from cla_convert.models import self_test
from cla_convert.models.shipped import update_code
from cla_convert.models.verify import verify_model
from tests.integration.test_convert import convert
from tests.unit.test_interface import renamed


@pytest.fixture
def unknown_transformers(monkeypatch: pytest.MonkeyPatch):
    """From now on, Llama's attention in transformers calls the cache by another name."""
    self_test._check.cache_clear()
    monkeypatch.setattr(LlamaAttention, "forward", renamed(LlamaAttention.forward, "kv_store"))
    yield
    self_test._check.cache_clear()


@pytest.fixture(scope="module")
def converted(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interface") / "converted"
    convert(tiny_llama, folder, "--init", "mean")
    return folder


@pytest.mark.parametrize("verb", ["convert", "dry-run", "run", "uptrain"])
def test_every_verb_that_works_on_a_model_refuses_first(verb, tiny_llama, converted, tmp_path, unknown_transformers):
    out = tmp_path / "out"
    words = {
        "convert": ["convert", str(tiny_llama), str(out)],
        "dry-run": ["convert", str(tiny_llama), str(out), "--dry-run"],
        "run": ["run", "demo", "--out", str(out), "--set", f"source.model={tiny_llama}"],
        "uptrain": ["uptrain", str(converted), str(out), "--teacher", str(tiny_llama), "--tokens", "100k"],
    }[verb]
    with pytest.raises(InputError, match="does not work with transformers 5") as caught:
        app(words, standalone_mode=False)
    assert caught.value.exit_code == ExitCode.INPUT and "pip install" in str(caught.value)
    assert not out.exists()


def test_a_model_whose_older_code_loses_the_cache_is_found_and_mended(converted, tmp_path):
    """As models published before transformers 5.24 go on there: without a cache, and without a word."""
    code = converted / "modeling_cla_llama.py"
    config, known = read_json(converted / "config.json"), code.read_text()
    looks_for_it = "cache = kwargs.pop(self.cache_argument, None)"
    assert looks_for_it in known
    code.write_text(known.replace(looks_for_it, "cache = kwargs.pop(self.cache_argument, None) and None"))
    with pytest.raises(InputError, match="token by token") as caught:
        verify_model(converted)
    assert "--update-code" in str(caught.value)
    update_code(converted)
    assert verify_model(converted)["ok"]
    assert code.read_text() == known and read_json(converted / "config.json") == config
    assert not list(converted.glob("*.new"))


def test_only_converted_models_have_code_to_update(tiny_llama):
    with pytest.raises(InputError, match="not a converted model"):
        update_code(tiny_llama)
