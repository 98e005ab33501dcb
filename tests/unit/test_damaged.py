"""Damaged and hostile files one by one: each is refused by name, none is taken for an absent one, none leads outside.

`tests/hostile.py` makes them by the thousand; these are the ones that once did harm.
"""

import importlib
import json
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cla_convert.conversion.convert import convert
from cla_convert.conversion.inspect import inspect_model
from cla_convert.conversion.plan import make_plan
from cla_convert.errors import ClaError, InputError, TrainingError, UsageError
from cla_convert.files import load_json, read_json, read_kept, write_json
from cla_convert.models.checkpoint import Checkpoint, put_back
from cla_convert.models.export import load_tokenizer
from cla_convert.models.fingerprint import fingerprint
from cla_convert.models.gguf_header import Header
from cla_convert.models.gguf_source import _check_sizes
from cla_convert.models.source import resolve_source
from cla_convert.models.verify import check_shares
from cla_convert.recipe import Recipe
from cla_convert.recipe_file import load_recipe
from cla_convert.record import recorded
from cla_convert.report.model_card import front_matter, source_card, write_model_card
from cla_convert.report.report import build_report
from cla_convert.run_folder import RunFolder
from cla_convert.same_recipe import check_same_recipe
from cla_convert.stages.uptrain import uptrain
from cla_convert.training.state import Position, TrainingStates
from tests.unit.test_gguf import write_gguf


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_header(path: Path, **changes: Any) -> None:
    """Change what the header of a safetensors file says of its first tensor."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 10**9}, {"num_hidden_layers": 10**30}, {"num_hidden_layers": "6"}, {"hidden_size": 0},
     {"num_attention_heads": -4}, {"head_dim": 1e308}, {"num_key_value_heads": [2]}, {"num_hidden_layers": True}],
    ids=str,
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused_at_once(changes: dict[str, Any], model: Path):
    edit(model / "config.json", **changes)
    with pytest.raises(InputError, match="does not describe a decoder-only transformer"):
        make_plan(Checkpoint.open(model), sharing="cla2", init="mean")
    described = inspect_model(str(model))
    assert described["supported"] is False and "A size is missing or does not fit" in described["reason"]


@pytest.mark.parametrize("architectures", [3, {"a": 1}, [None], [["x"]]], ids=str)
def test_an_unknown_model_with_odd_architectures_is_described(architectures: Any, model: Path):
    edit(model / "config.json", model_type="gpt_neox", architectures=architectures)
    assert inspect_model(str(model))["supported"] is False


@pytest.mark.parametrize(
    "changes",
    [{"dtype": 5}, {"dtype": ["F32"]}, {"shape": [-1, 2]}, {"shape": [2**70]}, {"shape": "x"}, {"shape": [1.5]},
     {"data_offsets": [0]}, {"data_offsets": {"a": 1, "b": 2}}, {"data_offsets": [-8, 0]}],
    ids=str,
)  # fmt: skip
def test_a_header_that_describes_no_tensor_is_refused(changes: dict[str, Any], model: Path):
    edit_header(model / "model.safetensors", **changes)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        Checkpoint.open(model)


def test_a_gguf_file_without_tensors_is_refused(tmp_path: Path):
    path = write_gguf(tmp_path / "tiny.gguf", "llama")
    with path.open("r+b") as file:
        file.seek(8)
        file.write(bytes(8))  # the number of tensors
    with pytest.raises(InputError, match="holds no tensors"):
        inspect_model(str(path))


@pytest.mark.parametrize(("key", "value"), [("block_count", 2**31), ("feed_forward_length", 10**9)])
def test_a_gguf_file_of_sizes_that_no_tensor_has_is_refused_before_it_is_built(key: str, value: int):
    header = {"general.architecture": "llama", "llama.embedding_length": 4, "llama.attention.head_count": 2}
    header |= {"llama.block_count": 1, "llama.feed_forward_length": 8}
    shapes = {"token_embd.weight": (9, 4), "blk.0.ffn_up.weight": (8, 4)}
    _check_sizes(Header(header, shapes, {}), 1000)
    with pytest.raises((ValueError, InputError)):
        _check_sizes(Header(header | {f"llama.{key}": value}, shapes, {}), 1000)


def test_lone_surrogates_survive_in_json(model: Path, tmp_path: Path):
    (tmp_path / "a.json").write_text('{"name": "a\\ud800b"}')
    write_json(tmp_path / "b.json", load_json(tmp_path / "a.json"))
    assert load_json(tmp_path / "b.json") == {"name": "a\ud800b"}

    edit(model / "config.json", note="\ud800")
    checkpoint = Checkpoint.open(model)
    convert(make_plan(checkpoint, sharing="cla2", init="mean"), checkpoint, tmp_path / "out")
    assert load_json(tmp_path / "out" / "config.json")["note"] == "\ud800"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000])
def test_damaged_json_is_no_absent_json_except_in_a_cache(content: bytes, tmp_path: Path):
    path = tmp_path / "x.json"
    assert read_json(path) is read_kept(path) is None
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json"):
        read_json(path)
    assert read_kept(path) is None


SMALL = [
    "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "model.safetensors.index.json", "chat_template.json",
]  # fmt: skip
TEMPLATES = ["chat_template.jinja", "additional_chat_templates/tools.jinja"]


@pytest.mark.parametrize(
    ("name", "content"),
    [*product(SMALL, [b"", b'{"a": ', b'["a", 1]', b"null", b"\xff\xfe\x00{"]), *product(TEMPLATES, [b"{{ \xff }}"])],
    ids=str,
)
def test_a_small_file_of_a_model_is_refused_by_name_by_every_verb(name: str, content: bytes, model: Path):
    edit(model / "config.json", kv_source_layers=[0, 0, 2, 2, 4, 4])
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(content)
    inspect, fetch, verify = inspect_model, resolve_source, check_shares  # also of convert and chat; of uptrain
    for read in (lambda: inspect(str(model)), lambda: fetch(str(model)), lambda: verify(model)):
        with pytest.raises(InputError, match=re.escape(str(model / name))) as refused:
            read()
        assert refused.value.why and refused.value.fix


@pytest.mark.parametrize(
    ("content", "why"),
    [('{\n "eos_token": "</s', "From line 2, column 15 on it is not valid JSON."), ("[1]", "It holds a list, and no")],
)
def test_a_damaged_tokenizer_is_told_by_its_file_wherever_it_is_loaded(content: str, why: str, model: Path):
    (model / "tokenizer_config.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer_config\.json cannot be read") as refused:
        load_tokenizer(model)
    assert refused.value.why.startswith(why) and "Download tokenizer_config.json" in refused.value.fix
    (model / "cla_manifest.json").write_text("{}")  # of which there is nothing to download
    with pytest.raises(InputError, match="from a copy of the model, or make the model again"):
        load_tokenizer(model)


@pytest.mark.parametrize(
    ("folder", "options"),
    [("my model", "--local-dir 'my model' --force-download"), ("hub/snapshots/1a2b", "--force-download")],
)
def test_a_damaged_file_is_downloaded_over_itself(folder: str, options: str):
    path = Path(folder) / "templates" / "x.jinja"
    assert f"`hf download REPO templates/x.jinja {options}`" in put_back(Path(folder), path)


def test_a_tokenizer_that_transformers_does_not_load_is_not_said_to_be_missing(model: Path):
    edit(model / "tokenizer_config.json", bos_token=7)
    with pytest.raises(InputError, match=r"bos_token(?s:.*)Download tokenizer\.json and tokenizer_config\.json of"):
        load_tokenizer(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"Put the model's tokenizer files \(tokenizer.json, "):
        load_tokenizer(model)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": float("-inf")}, "rms_norm_eps is -inf"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ({"rope_parameters": {"rope_type": "linear", "factor": float("inf")}}, "rope_parameters.factor is inf"),
        ({"rope_scaling": {"long_factor": [1.0, float("nan")]}}, "rope_scaling.long_factor is nan"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
    ],
)
def test_a_number_that_no_model_has_is_refused_where_it_is_opened(changes: dict[str, Any], told: str, model: Path):
    edit(model / "config.json", **changes)
    with pytest.raises(InputError, match=f"^{re.escape(told)} in config.json of {model}\n") as refused:
        Checkpoint.open(model)
    assert "number" in refused.value.why


def test_notes_of_whoever_trained_a_model_may_hold_any_number(model: Path):
    edit(model / "config.json", notes={"loss": float("nan")}, task_specific_params={"max_position_embeddings": -1})
    Checkpoint.open(model)


def test_no_number_of_an_unsupported_model_keeps_it_from_being_described(model: Path):
    edit(model / "config.json", model_type="mamba2", time_step_limit=[0.0, float("inf")])  # as published
    assert not inspect_model(str(model))["supported"]


def test_what_is_wrong_with_the_settings_of_a_model_is_not_said_of_its_tokenizer(model: Path):
    edit(model / "config.json", vocab_size="many")
    with pytest.raises(InputError, match=r"cannot build the model that config.json describes(?s:.*)'vocab_size'"):
        load_tokenizer(model)


def test_a_damaged_result_is_not_trained_again(tmp_path: Path):
    recipe = Recipe.model_validate({"source": {"model": "m"}, "train": {"tokens": 2000}})
    folder = RunFolder(tmp_path)
    folder.save_recipe(recipe)
    folder.training.model.mkdir()
    for content, wrong in (('{"tokens": 10', "cannot be read"), ('{"tokens": "ten"}', "is damaged")):
        (tmp_path / "train.json").write_text(content)
        with pytest.raises(InputError, match=rf"train\.json {wrong}"):
            uptrain(recipe, folder)
        assert (tmp_path / "train.json").read_text() == content


@pytest.mark.parametrize("name", ["train.json", "convert.json", "environment.json", "eval/after/results.json"])
def test_a_report_names_the_damaged_file(name: str, run_dir: Path):
    (run_dir / name).write_text("{")
    with pytest.raises(InputError, match=Path(name).name):
        build_report(run_dir)
    assert not (run_dir / "report.md").exists()


@pytest.mark.parametrize("content", ["eval: {margin: 0.5", "- 1", "", "a: *nothing", "? [a]\n: b"])
def test_a_damaged_recipe_is_an_error_and_no_other_margin(content: str, run_dir: Path):
    (run_dir / "recipe.yaml").write_text(content)
    with pytest.raises(ClaError, match=r"recipe\.yaml|recipe is not valid"):
        build_report(run_dir)
    (run_dir / "converted").mkdir()
    with pytest.raises(UsageError):
        check_same_recipe(RunFolder(run_dir), Recipe(), overwrite=False)


def test_a_trained_model_alone_belongs_to_its_recipe_too(run_dir: Path):
    """The converted model may be removed for the room it takes; what was trained from it is still of that recipe."""
    folder = RunFolder(run_dir)
    folder.save_recipe(Recipe())
    folder.training.model.mkdir(exist_ok=True)
    assert not folder.converted.exists()
    other = Recipe.model_validate({"train": {"tokens": 5000}})
    with pytest.raises(UsageError, match="train.tokens"):
        check_same_recipe(folder, other, overwrite=False)


def test_an_environment_of_another_type_is_found_before_the_work(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.save_recipe(Recipe())
    write_json(tmp_path / "environment.json", {"stages": ["plan", 3]})
    with pytest.raises(InputError, match=r"environment\.json is damaged"), recorded(Recipe(), folder, "plan"):
        pytest.fail("the work began")


def test_results_of_another_type_are_an_error(run_dir: Path):
    write_json(run_dir / "eval" / "after" / "results.json", {"tasks": {"piqa": 3}})
    with pytest.raises(InputError, match="cannot be read"):
        build_report(run_dir)


@pytest.mark.parametrize(
    ("fails", "error"),
    [(lambda *_: importlib.import_module("not_installed"), ModuleNotFoundError),
     (lambda *_: Path("not_there").read_text(), FileNotFoundError)],
)  # fmt: skip
def test_a_missing_package_or_what_the_system_refuses_is_not_blamed_on_the_results(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., Any], error: type[Exception]
):
    monkeypatch.setattr("cla_convert.report.report.pictures", fails)
    with pytest.raises(error, match="not_"):
        build_report(run_dir)


def test_metrics_may_end_in_the_middle_of_a_line_and_are_whole_before(run_dir: Path):
    build_report(run_dir)  # its last line is cut off
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    (run_dir / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:9], *lines[2:]]))
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged"):
        build_report(run_dir)


def test_aliases_that_unfold_to_a_billion_values_are_refused(tmp_path: Path):
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="more than 10000 values"):
        load_recipe(tmp_path / "recipe.yaml")
    assert front_matter("---\na: &a [*a]\nlicense: 2024-99-99\n---\n") == {}


def test_a_checkpoint_of_another_student_is_refused(tiny_llama: Path, tmp_path: Path):
    checkpoint = Checkpoint.open(tiny_llama)
    for init in ("mean", "first"):
        convert(make_plan(checkpoint, sharing="cla2", init=init), checkpoint, tmp_path / init)
    student = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(student.parameters())
    student(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = TrainingStates(tmp_path / "checkpoints", {"model": fingerprint(tmp_path / "mean")}, keep=1)
    saved.save(Position(step=1), student, [optimizer])
    assert TrainingStates(tmp_path / "checkpoints", {"model": fingerprint(tmp_path / "mean")}, keep=1).latest()
    other = TrainingStates(tmp_path / "checkpoints", {"model": fingerprint(tmp_path / "first")}, keep=1)
    with pytest.raises(TrainingError, match="belong to another run"):
        other.latest()


SECRET = "the secret of another file"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "secret"
    path.parent.mkdir()
    path.write_text(json.dumps({"seeds": {"x": SECRET}, "license": SECRET}))
    return path


@pytest.mark.parametrize("name", ["environment.json", "recipe.yaml", "train.json", "eval/after/results.json"])
def test_a_report_shows_no_file_from_outside(name: str, run_dir: Path, secret: Path):
    (run_dir / name).unlink()
    (run_dir / name).symlink_to(secret)
    with pytest.raises(InputError, match="link to outside of the run folder"):
        build_report(run_dir)


def test_a_report_replaces_links_and_does_not_write_through_them(run_dir: Path, secret: Path):
    before = secret.read_text()
    for name in ("report.md", "report.html", "report.json", "loss.png"):
        (run_dir / name).symlink_to(secret)
    with pytest.raises(InputError):
        build_report(run_dir)
    (run_dir / "report.json").unlink()
    build_report(run_dir)
    assert secret.read_text() == before


def test_a_link_to_a_file_of_no_model_is_not_copied_into_the_output(model: Path, secret: Path, tmp_path: Path):
    (model / "LICENSE").unlink()
    (model / "LICENSE").symlink_to(secret)
    checkpoint = Checkpoint.open(model)
    with pytest.raises(InputError, match="LICENSE is a link"):
        convert(make_plan(checkpoint, sharing="cla2", init="mean"), checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_links_to_a_model_and_the_hubs_cache_work(tiny_llama: Path, tmp_path: Path):
    linked, snapshot = tmp_path / "linked", tmp_path / "hub" / "snapshots" / "main"
    for folder in (linked, snapshot, tmp_path / "hub" / "blobs"):
        folder.mkdir(parents=True)
    for file in tiny_llama.iterdir():
        (linked / file.name).symlink_to(file)
        shutil.copyfile(file, tmp_path / "hub" / "blobs" / f"blob-of-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-of-{file.name}")
    for folder in (linked, snapshot):
        Checkpoint.open(folder).copy_sidecars(tmp_path)
    assert (tmp_path / "LICENSE").read_text() == "Test licence\n"


def test_a_card_reads_no_file_from_outside_and_writes_none(model: Path, secret: Path):
    secret.write_text(f"---\nlicense: {SECRET}\n---\n")
    (model / "README.md").symlink_to(secret)
    assert source_card(model) is None
    write_model_card(model, {})
    assert SECRET in secret.read_text() and SECRET not in (model / "README.md").read_text()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"---\n\xff\n---\n", b"---\na: !!python/name:os.system\n---\n"])
def test_a_card_of_any_bytes_is_read(content: bytes, model: Path):
    (model / "README.md").write_bytes(content)
    assert front_matter(source_card(model)) == {}


HOSTILE = (
    'x"\n```\n# heading\n![i](http://evil/i.png) [l](javascript:alert(1)) <img src=x onerror=alert(1)> {{ 7 * 7 }}'
)


def test_names_from_outside_are_text_wherever_they_stand(run_dir: Path, tmp_path: Path):
    settings = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(settings | {"note": HOSTILE, "source": {"model": HOSTILE}}))
    source = {"model": HOSTILE, "revision": HOSTILE, "license": HOSTILE, "quantization": HOSTILE}
    edit(run_dir / "convert.json", source=source, sharing=HOSTILE, init=HOSTILE)
    edit(run_dir / "environment.json", command=HOSTILE, versions={HOSTILE: HOSTILE}, stages={HOSTILE: 1})
    edit(run_dir / "eval" / "after" / "kv_cache.json", dtype=HOSTILE)
    report = build_report(run_dir)
    card = write_model_card(tmp_path, report, point="after").read_text().split("\n---\n", 1)[1]
    for text in ((run_dir / "report.md").read_text(), card):
        prose = "".join(text.split("\n```")[::2])  # what is not in a block of code
        assert "](http://evil" not in prose and "](javascript" not in prose
        assert "<img" not in prose and "\n# heading" not in prose
        assert "49" not in text.replace("4096", "") or "{{ 7 * 7 }}" in text
        assert text.count("\n```") % 2 == 0
    assert "<img" not in (run_dir / "report.html").read_text()
