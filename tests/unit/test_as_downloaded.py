"""Model folders as people have them: cloned without the large files, edited under Windows, without a tokenizer."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cla_convert.conversion.convert import convert
from cla_convert.conversion.inspect import inspect_model
from cla_convert.conversion.plan import make_plan
from cla_convert.errors import InputError, UsageError
from cla_convert.models.checkpoint import INDEX, Checkpoint
from cla_convert.models.clean_check import reads_what_it_writes
from cla_convert.models.export import load_tokenizer
from cla_convert.models.source import resolve_source
from cla_convert.models.verify import verify_model
from cla_convert.recipe import Recipe
from cla_convert.run_folder import RunFolder
from cla_convert.same_recipe import check_same_recipe

from ..conftest import byte_tokenizer, save_tiny_llama
from ..tiny import save_tiny

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "m")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tiny.gguf"])
def test_a_clone_without_its_large_files(name, model):
    (model / "model.safetensors").unlink()
    (model / name).write_text(POINTER)
    for given in (model, model / name) if name.endswith("gguf") else (model,):
        with pytest.raises(InputError, match=f"{name} is not the file itself") as caught:
            Checkpoint.open(resolve_source(str(given), allow_pickle=True))
        assert "git lfs pull" in caught.value.fix


def test_a_clone_whose_other_weights_stayed_behind_is_none(model):
    (model / "pytorch_model.bin").write_text(POINTER)
    (model / "tiny.gguf").write_text(POINTER)
    assert inspect_model(str(model))["supported"] is True


def test_a_tokenizer_that_stayed_behind(model):
    (model / "tokenizer.json").write_text(POINTER)
    with pytest.raises(InputError, match="tokenizer.json is not the file itself"):
        load_tokenizer(model)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_transformers_could_not_read(name, encoding, tmp_path):
    """Read by us alone, a model would be converted and its source neither be measured nor teach."""
    folder = save_tiny_llama(tmp_path / "m", max_shard_size="40KB")
    (folder / name).write_text((folder / name).read_text(), encoding=encoding)
    with pytest.raises(InputError, match=f"{name} is not plain UTF-8"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_layer_types_of_another_length(case, tmp_path):
    """Llama needs none; transformers counts it nevertheless, and would load neither model nor tokenizer."""
    folder = save_tiny(case, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_types": ["full_attention"] * 3}))
    with pytest.raises(InputError, match="the kind of 3 layers, not of 6"):
        make_plan(Checkpoint.open(folder), sharing="cla2", init="mean")


def test_a_source_that_was_moved_may_be_linked(model, tmp_path):
    """Hours of training are not begun anew for the name of a folder."""
    run, old = RunFolder(tmp_path / "run"), tmp_path / "old"
    run.converted.mkdir(parents=True)
    run.save_recipe(Recipe.model_validate({"source": {"model": str(old)}}))
    with pytest.raises(UsageError, match="another recipe") as caught:
        check_same_recipe(run, Recipe.model_validate({"source": {"model": str(model)}}), False)
    assert f"leave a link to it at {old}" in caught.value.fix
    old.symlink_to(model)
    check_same_recipe(run, Recipe.model_validate({"source": {"model": str(old)}}), False)
    with pytest.raises(UsageError) as caught:
        check_same_recipe(run, Recipe.model_validate({"source": {"model": str(model)}}), False)
    assert "link" not in caught.value.fix
    run.save_recipe(Recipe.model_validate({"source": {"model": "HuggingFaceTB/SmolLM2-135M"}}))
    with pytest.raises(UsageError) as caught:
        check_same_recipe(run, Recipe.model_validate({"source": {"model": str(model)}}), False)
    assert "link" not in caught.value.fix  # a hub id is no place


def test_verify_says_that_there_is_no_tokenizer(model, tmp_path):
    for file in model.glob("tokenizer*"):
        file.unlink()
    source = Checkpoint.open(model)
    convert(make_plan(source, sharing="cla2", init="mean"), source, tmp_path / "out")
    with pytest.raises(InputError, match="has no tokenizer") as caught:
        verify_model(tmp_path / "out")
    assert "tokenizer.json" in caught.value.fix


def test_a_tokenizer_without_capitals_or_most_signs_is_no_fault(model, tmp_path):
    """As those of old word lists; one that does not read what it writes is one."""
    words = PreTrainedTokenizerFast(
        tokenizer_object=without_capitals(), unk_token="[UNK]", bos_token="[UNK]", eos_token="[UNK]"
    )
    words.save_pretrained(model)
    source = Checkpoint.open(model)
    convert(make_plan(source, sharing="cla2", init="mean"), source, tmp_path / "out")
    assert verify_model(tmp_path / "out")["ok"]


def without_capitals() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "key": 2, "value": 3}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    return tokenizer


def test_a_tokenizer_reads_what_it_writes():
    tokenizer = byte_tokenizer()
    ids = tokenizer("Élan, 2024", return_tensors="pt").input_ids[0]
    assert reads_what_it_writes(tokenizer, ids)
    tokenizer.backend_tokenizer.decoder = decoders.Replace("n", "nn")  # signs of bytes stay, and something grows
    assert not reads_what_it_writes(tokenizer, ids)
