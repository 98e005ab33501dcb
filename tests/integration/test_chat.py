"""`cla-convert chat`: both models answer, with their template and their own history; and `verify --cache`."""

import io
import json
import shutil
from pathlib import Path

import pytest

from cla_convert.chat import Manner, Speaker, chat, lines_of
from cla_convert.errors import InputError
from tests.conftest import byte_tokenizer, save_tiny_llama
from tests.integration.test_convert import convert
from tests.launch import cla

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("chat")
    save_tiny_llama(folder / "source")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "source")
    convert(folder / "source", folder / "converted", "--init", "mean", "--sharing", "cla2")
    return folder / "source", folder / "converted"


def speaker(folder: Path, **manner) -> Speaker:
    settings = {"max_new_tokens": 8} | manner
    return Speaker.load(folder.name, folder, device="cpu", dtype="float32", manner=Manner(**settings))


def test_the_command_line_lets_both_answer(pair: tuple[Path, Path]):
    source, converted = pair
    done = cla("chat", converted, "--beside", source, "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr  # nothing to read: it ends
    assert done.stdout == ""


def test_answers_stream_to_stdout_and_are_the_models_own(pair: tuple[Path, Path], capsys: pytest.CaptureFixture):
    source, converted = pair
    speakers = [speaker(converted), speaker(source)]
    chat(speakers, lines_of(io.StringIO("Hello\n\nAgain\n")))
    out = capsys.readouterr().out
    assert out.count("[converted] ") == out.count("[source] ") == 2
    for one in speakers:
        assert [turn["role"] for turn in one.turns] == ["user", "assistant"] * 2
        ids = one.tokenizer(f"<user>Hello<assistant>{one.turns[1]['content']}<user>Again:", return_tensors="pt")
        tokens = one.model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[
            0, ids.input_ids.shape[1] :
        ]
        said = one.tokenizer.decode(tokens, skip_special_tokens=True)
        assert said.strip() == one.turns[3]["content"] and said in out


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", "leaves system prompts out"),
        ("", "no chat template"),
    ],
)
def test_a_system_prompt_that_has_no_place_is_refused(pair: tuple[Path, Path], tmp_path: Path, template: str, why: str):
    shutil.copytree(pair[0], tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(template)
    done = cla("chat", tmp_path / "model", "--system", "Be brief.")
    assert done.returncode == 2 and why in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_reset_begins_anew_and_the_system_prompt_stays(pair: tuple[Path, Path]):
    one = speaker(pair[1], system="Be brief.")
    prompts = []
    original = one.tokenizer.apply_chat_template
    one.tokenizer.apply_chat_template = lambda turns, **kw: prompts.append(list(turns)) or original(turns, **kw)
    chat([one], ["Hello", "/reset", "Hello"])
    assert (
        prompts[0] == prompts[1] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    )


def test_what_the_context_has_no_room_for_is_forgotten(pair: tuple[Path, Path]):
    one = speaker(pair[1])
    chat([one], ["x" * 200, "y" * 200, "z" * 200])  # a context of 512 tokens
    assert [turn["content"][:1] for turn in one.turns if turn["role"] == "user"] == ["y", "z"]


def test_without_a_template_text_is_continued(tmp_path: Path, capsys: pytest.CaptureFixture):
    one = speaker(save_tiny_llama(tmp_path / "plain"))
    chat([one], ["Hello"])
    captured = capsys.readouterr()
    assert "no chat template" in captured.err and captured.out.endswith("\n") and not one.turns


def test_a_model_that_says_nothing_is_said_to(pair: tuple[Path, Path], capsys: pytest.CaptureFixture):
    silent, other = speaker(pair[0]), speaker(pair[1])
    silent.model.generate = lambda **arguments: None
    chat([silent, other], lines_of(io.StringIO("Hello\n")))
    assert capsys.readouterr().err.count("says nothing") == 1 + (not other.turns[1]["content"])


def test_verify_measures_the_cache_in_a_clean_process(pair: tuple[Path, Path]):
    source, converted = pair
    for beside in ([], ["--beside", source]):
        done = cla("verify", converted, "--cache", *beside, "--json")
        assert done.returncode == 0, done.stderr
        cache = json.loads(done.stdout)["cache"]
        per_token = 2 * 2 * 8 * 4  # keys and values of 2 heads with 8 channels in float32
        assert cache["bytes"] == {"dynamic": 3 * 256 * per_token, "static": 3 * 256 * per_token}
        assert cache["unshared_bytes"] == {"dynamic": 6 * 256 * per_token, "static": 6 * 256 * per_token}
        assert cache["saved"] == 2
    words = cla("verify", converted, "--cache").stdout
    assert "3 of 6 layers hold keys and values: 2.00x smaller" in words


def test_comparing_with_another_model_is_refused(pair: tuple[Path, Path], tmp_path: Path):
    other = save_tiny_llama(tmp_path / "other", num_hidden_layers=4)
    done = cla("verify", pair[1], "--cache", "--beside", other)
    assert done.returncode == 3 and "is not the source of" in done.stderr
    assert cla("verify", pair[1], "--beside", pair[0]).returncode == 2


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m.role }", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"]
)
def test_a_chat_template_that_does_not_work_is_done_without(pair, tmp_path, capsys, template):
    shutil.copytree(pair[0], tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(template)
    one = speaker(tmp_path / "model")
    chat([one], ["Hello"])
    assert not one.converses and capsys.readouterr().err.count("does not work") == 1


def test_a_chat_template_that_demands_a_system_prompt_gets_it(pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "model")
    demanding = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + TEMPLATE
    (tmp_path / "model/chat_template.jinja").write_text(demanding)
    assert speaker(tmp_path / "model", system="Be brief.").converses
    assert not speaker(tmp_path / "model").converses


def test_a_question_that_a_chat_template_refuses_is_forgotten_and_said(pair, tmp_path, capsys):
    shutil.copytree(pair[0], tmp_path / "model")
    late = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + TEMPLATE
    (tmp_path / "model/chat_template.jinja").write_text(late)
    one = speaker(tmp_path / "model")
    with pytest.raises(InputError, match="1 answer is missing"):
        chat([one], ["Hello", "Again", "/reset", "Hello"])
    _, answer = one.turns
    assert capsys.readouterr().out.count(answer["content"]) == 2  # what came before it, and after
    with pytest.raises(InputError, match=r"The chat template of model failed\s+one turn only"):
        one.answer("Again")
    assert [turn["role"] for turn in one.turns] == ["user", "assistant"]  # the question is forgotten


@pytest.mark.parametrize("asked", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_a_model_that_asks_for_beams_answers_too(pair, tmp_path, asked):
    shutil.copytree(pair[0], tmp_path / "model")
    stated = tmp_path / "model/generation_config.json"
    stated.write_text(json.dumps(json.loads(stated.read_text()) | asked))
    assert speaker(tmp_path / "model").answer("Hello") == speaker(pair[0]).answer("Hello")


def test_a_line_that_is_no_utf_8_is_answered(pair, capsys):
    chat([speaker(pair[0])], lines_of(io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8")))
    assert capsys.readouterr().out
