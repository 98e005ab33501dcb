"""Tokenizers and lengths that do not suit a model are said before work; halves of characters are read as U+FFFD."""

import json
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from cla_convert import console, pipeline
from cla_convert.chat import Manner, Speaker
from cla_convert.cli import app
from cla_convert.conversion.convert import convert
from cla_convert.conversion.initialisation import CalibrationText
from cla_convert.conversion.plan import make_plan
from cla_convert.errors import InputError
from cla_convert.evaluation.agreement import agreement
from cla_convert.evaluation.cache import kv_cache_of
from cla_convert.evaluation.local_rows import local_splits
from cla_convert.evaluation.perplexity import token_perplexity
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import load_model
from cla_convert.models.shape import positions_of
from cla_convert.preflight import (
    calibration_length,
    check_evaluation,
    check_lengths,
    check_prefix,
    check_tokenizer,
    fitted,
)
from cla_convert.recipe import Recipe, TextFile
from cla_convert.recipe_file import load_recipe
from cla_convert.run_folder import RunFolder
from cla_convert.stages.check import check
from cla_convert.stages.evaluate import texts_of
from cla_convert.stages.plan import bound, plan_of, preview
from cla_convert.stages.text import calibration
from cla_convert.stages.uptrain import uptrain
from cla_convert.training.sources import documents
from tests.conftest import byte_tokenizer
from tests.tiny import save_tiny

CONFIG = {"vocab_size": 258, "max_position_embeddings": 512}


def test_ids_beyond_the_embedding():
    check_tokenizer(byte_tokenizer(), CONFIG)
    with pytest.raises(InputError, match=r"has 256 rows; tokens beyond: 2, such as '.+' \(256\), '.+' \(257\)"):
        check_tokenizer(byte_tokenizer(), {"vocab_size": 256})
    for added in ({"eos_token": "<|im_end|>"}, {"bos_token": "<s>"}):
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens(added)
        with pytest.raises(InputError, match="not the model's"):
            check_tokenizer(tokenizer, CONFIG)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["word"])
    with pytest.raises(InputError, match=r"'word' \(258\)"):
        check_tokenizer(tokenizer, CONFIG)
    check_tokenizer(tokenizer, {"vocab_size": 512})  # many embeddings have rows to spare


def test_a_special_token_that_no_text_holds_is_only_warned_about(capsys):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    console.TOLD.clear()
    for _ in range(2):
        check_tokenizer(tokenizer, {"text_config": CONFIG})
    assert capsys.readouterr().err.count("'<image>' (258)") == 1
    tokenizer.chat_template = "{% for message in messages %}<image>{{ message.content }}{% endfor %}"
    with pytest.raises(InputError, match="not the model's"):
        check_tokenizer(tokenizer, CONFIG)


def test_text_that_does_hold_it_is_refused_wherever_it_is_read(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    source = save_tiny("llama", tmp_path / "m")
    tokenizer.save_pretrained(source)
    ids = tokenizer("An <image> of a cat", return_tensors="pt").input_ids
    model, checkpoint = load_model(source), Checkpoint.open(source)
    plan = make_plan(checkpoint, sharing="cla2", init="calibrated")
    speaker = Speaker.load("m", source, device="cpu", dtype="float32", manner=Manner(max_new_tokens=1))
    speaker.answer("A cat")
    for read in (
        lambda: token_perplexity(model, ids),
        lambda: agreement(model, model, ids),
        lambda: convert(plan, checkpoint, tmp_path / "out", calibration=CalibrationText(ids, "", "cpu", 0, 1)),
        lambda: speaker.answer("An <image> of a cat"),
    ):
        with pytest.raises(InputError, match="It gives token 258; the model knows 258"):
            read()


def test_something_to_begin_with():
    tokenizer = byte_tokenizer()
    check_prefix(tokenizer)
    tokenizer.bos_token = None
    check_prefix(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither BOS nor EOS"):
        check_prefix(tokenizer)


def test_positions_by_every_name():
    assert positions_of(CONFIG) == positions_of({"text_config": CONFIG}) == positions_of({"n_positions": 512}) == 512
    assert positions_of({}) is None


def test_a_length_beyond_the_positions_is_refused_before_work(tmp_path):
    overrides = ["train.tokens=100k", "train.loss=cross_entropy", "train.sequence_length=1024"]
    source = save_tiny("llama", tmp_path / "m")
    common = [f"source.model={source}", "convert.init=mean", "eval.tasks=[arc_easy]", "eval.limit=1", "device=cpu"]
    recipe = load_recipe(None, [*common, *overrides]).recipe
    with pytest.raises(InputError, match="train.sequence_length"):
        check(recipe, RunFolder(tmp_path / "run"))


def test_without_training_its_length_means_nothing():
    check_lengths(Recipe(), CONFIG)


def test_calibration_is_cut_to_the_positions(tmp_path, capsys):
    source = save_tiny("gpt_bigcode", tmp_path / "m", n_positions=64, max_position_embeddings=64)
    recipe = load_recipe(
        None, [f"source.model={source}", "convert.calibration={tokens: 1k, sequence_length: 1024}", "device=cpu"]
    ).recipe
    folder = RunFolder(tmp_path / "run")
    plan_of(recipe, folder)
    looked_at = calibration(recipe, folder)
    assert looked_at is not None and looked_at.tokens.shape[1] == 64
    assert "sequences of 64 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("source", [{"path": "not-there.txt"}, {"generate": {"tokens": 4096}}])
def test_too_few_rows_to_choose_a_map_are_told_before_any_text(tmp_path: Path, source: dict):
    model, settings = save_tiny("llama", tmp_path / "m"), {"tokens": 319, "sequence_length": 64}
    tree = {"source": {"model": str(model)}, "device": "cpu", "data": {"sources": [source]}}
    recipe = Recipe.model_validate(tree | {"convert": {"sharing": "auto", "calibration": settings}})
    for stage in (plan_of, preview, partial(bound, anew=False)):
        with pytest.raises(InputError, match="needs more than 4 rows of calibration text") as refused:
            stage(recipe, RunFolder(tmp_path / "run"))
        assert "there are 4, of 64 tokens" in refused.value.why and "Give 320 tokens or more" in refused.value.fix


@pytest.mark.parametrize("init", ["calibrated", "mean"])
def test_every_verb_that_reads_text_or_writes_a_model_looks_at_the_tokenizer(tmp_path, init):
    source = save_tiny("llama", tmp_path / "m")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(source)
    recipe = load_recipe(None, [f"source.model={source}", f"convert.init={init}", "device=cpu"]).recipe
    for look in (
        lambda: plan_of(recipe, RunFolder(tmp_path / "run")),
        lambda: preview(recipe, RunFolder(tmp_path / "run")),
        lambda: check_evaluation(source),
        lambda: Speaker.load("m", source, device="cpu", dtype="float32", manner=Manner()),
    ):
        with pytest.raises(InputError, match="not the model's"):
            look()


def test_a_model_without_a_tokenizer_needs_none_where_no_text_is_read(tmp_path):
    source = save_tiny("llama", tmp_path / "m")
    for file in source.glob("tokenizer*"):
        file.unlink()
    recipe = load_recipe(None, [f"source.model={source}", "convert.init=mean", "device=cpu"]).recipe
    assert plan_of(recipe, RunFolder(tmp_path / "run")).init == "mean"


def test_windows_are_no_longer_than_the_context_and_recorded_so(tmp_path, capsys):
    source = save_tiny("llama", tmp_path / "m", max_position_embeddings=64)
    (tmp_path / "text.txt").write_text("Some text of so many words. " * 50)
    config = Checkpoint.open(source).config
    short, long = (TextFile(name=name, path=str(tmp_path / "text.txt"), window=n) for name, n in (("a", 64), ("b", 65)))
    assert fitted([short, long], config) == [short, long.model_copy(update={"window": 64})]
    assert "perplexity b: windows of 64 tokens, which is what the model was built for, and not of 65" in (
        capsys.readouterr().err
    )
    assert fitted([long], {}) == [long]
    line = ["eval", str(source), "--perplexity", str(tmp_path / "text.txt"), "--set", "device=cpu"]
    app([*line, "--out", str(tmp_path / "out"), "--json"], standalone_mode=False)
    said = capsys.readouterr()
    assert said.err.count("windows of 64 tokens, which is what the model was built for, and not of 1024") == 1
    assert json.loads(said.out)["texts"]["perplexity/text"]["window"] == 64
    assert json.loads((tmp_path / "out" / "perplexity" / "text.json").read_text())["window"] == 64


def test_a_run_measures_texts_and_held_out_text_within_the_context(tmp_path, capsys):
    source = save_tiny("llama", tmp_path / "m", max_position_embeddings=64)
    (tmp_path / "text.txt").write_text("Some text of so many words. " * 200)
    text = f"path: {tmp_path / 'text.txt'}"
    settings = [f"data.sources=[{{{text}}}]", f"eval.perplexity=[{{name: own, {text}}}]", "convert.init=mean"]
    settings += ["train.sequence_length=128", "eval.domain_tokens=0", "eval.prompts=[]", "device=cpu"]
    recipe = load_recipe(None, settings, {"source.model": str(source)}).recipe
    folder = RunFolder(tmp_path / "run")
    folder.save_recipe(recipe)
    texts = texts_of(recipe, folder)
    assert texts.held_out.shape[1] == texts.compared["own"].shape[1] == texts.files[0].window == 64
    said = capsys.readouterr().err
    assert "held-out text: windows of 64 tokens, which is what the model was built for, and not of 128" in said
    assert "perplexity own: windows of 64 tokens" in said


def test_the_cache_is_measured_within_the_positions(tmp_path):
    model = load_model(save_tiny("gpt_bigcode", tmp_path / "m", n_positions=64, max_position_embeddings=64))
    assert kv_cache_of(model)["tokens"] == 32


def half(folder: Path, name: str, key: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{key: f"Row {i} of ordinary text."} for i in range(3)] + [{key: "cut in an emoji \ud83d", "n": ["\udc00"]}]
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder / name


def test_halves_of_characters_are_replaced_and_said_once(tmp_path, capsys):
    console.TOLD.clear()
    path = half(tmp_path, "text.jsonl", "text")
    recipe = load_recipe(None, [f"data.sources=[{{path: {path}}}]"]).recipe
    for _ in range(2):
        found = [document.content for document in documents(recipe.data.sources[0], 0)]
    assert found[3] == "cut in an emoji \ufffd" and found[0] == "Row 0 of ordinary text."
    assert capsys.readouterr().err.count("lone surrogates") == 1


def test_halves_of_characters_in_rows_of_a_task(tmp_path):
    half(tmp_path / "task", "test.jsonl", "question")
    rows = local_splits(tmp_path / "task")["test"]
    assert {"question": "cut in an emoji \ufffd", "n": ["\ufffd"]} in list(rows)
    json.dumps(list(rows), ensure_ascii=False).encode()


def test_a_dry_run_looks_at_the_disk_of_the_output_and_at_what_is_there(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or Usage(0, 0, 10_000))
    model = save_tiny("llama", tmp_path / "model")
    settings = ["train.tokens=0", "convert.init=mean", "eval.tasks=[arc_easy]"]
    recipe = load_recipe(None, settings, {"source.model": str(model)}).recipe
    planned = {"overwrite": False, "allow_changes": ()}
    with pytest.raises(InputError, match=f"The disk of {tmp_path} is too small"):
        pipeline.dry_run(recipe, tmp_path / "run", **planned)
    assert asked == [tmp_path]
    shutil.copytree(model, tmp_path / "run" / "converted")  # nothing is left to write
    RunFolder(tmp_path / "run").save_recipe(recipe)
    assert pipeline.dry_run(recipe, tmp_path / "run", **planned).sharing == "cla2-keep-ends"


class Begun(Exception):
    """The work has begun."""


@pytest.mark.parametrize(
    ("free", "begun", "parameters", "refused"),
    [
        (1_100_000, False, "all", False),
        (600_000, False, "all", True),  # float32 weights and two moments of each, and the model
        (600_000, False, "attention", False),
        (600_000, True, "all", False),  # it may be at its end
        (100_000, True, "all", True),
        (600_000, "anew", "all", False),  # what was begun makes room for it
    ],
)
def test_uptraining_asks_for_the_disk_of_its_first_checkpoint_before_work(
    tiny_llama, tmp_path, monkeypatch, free, begun, parameters, refused
):
    folder = RunFolder(tmp_path, converted=tiny_llama)
    settings = [f"source.model={tiny_llama}", "train.tokens=64k", f"train.parameters={parameters}", "device=cpu"]
    recipe = load_recipe(None, settings, {}).recipe
    if begun:
        folder.save_recipe(recipe)
        (folder.training.checkpoints / "step-1").mkdir(parents=True)
        (folder.training.checkpoints / "step-1" / "state").write_bytes(bytes(500_000))

    def work(*_, **__):
        raise Begun

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    monkeypatch.setattr("cla_convert.training.loop.uptrain", work)
    with pytest.raises(InputError, match="too small") if refused else pytest.raises(Begun):
        uptrain(recipe, folder, fresh=begun == "anew")


def test_rows_longer_than_the_model_are_said_to_be_shorter_once(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe.model_validate({"convert": {"calibration": {"sequence_length": 1024}}})
    console.TOLD.clear()
    for _ in range(2):  # the plan's disk asks, too
        assert calibration_length(recipe, {"model_type": "llama", "max_position_embeddings": 512}, "cpu") == 512
    assert capsys.readouterr().err.count("calibrating on sequences of 512 tokens") == 1
