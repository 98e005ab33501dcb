"""Prompts answered at every point: the likeliest tokens, none that was trained on, side by side in the report."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cla_convert.evaluation import answers as module
from cla_convert.evaluation.answers import _asked, answers, unseen
from cla_convert.evaluation.harness import identity_of
from cla_convert.evaluation.prepare import Prepared
from cla_convert.evaluation.texts import Texts, measure_texts
from cla_convert.files import write_json
from cla_convert.models.export import load_model, load_tokenizer
from cla_convert.report.report import build_report
from tests.conftest import byte_tokenizer, save_tiny_llama

COMMON = {"batch_size": 2, "device": "cpu", "dtype": "float32"}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def likeliest(model, ids: list[int], count: int) -> list[int]:
    """By recomputing everything for every token."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
    return ids


@pytest.mark.parametrize("template", [None, TEMPLATE, "{{ raise_exception('no such turn') }}"])
def test_an_answer_is_the_likeliest_tokens(tiny_llama: Path, template: str | None):
    model, tokenizer = load_model(tiny_llama), load_tokenizer(tiny_llama)
    tokenizer.chat_template = template
    asked = "<user>Who?<a>" if template == TEMPLATE else "Question: Who?\nAnswer:"
    start = tokenizer(asked)["input_ids"]
    made = likeliest(model, start, 6)[len(start) :]
    found = answers(model, tokenizer, ["Who?", "And why?"], 6)["answers"]
    assert [row["prompt"] for row in found] == ["Who?", "And why?"]
    assert found[0]["text"] == tokenizer.decode(made, skip_special_tokens=True).strip()
    assert found[0]["cut"] is (len(made) == 6 and made[-1] != 1)


def test_a_prompt_is_the_same_on_every_day(tiny_llama: Path):
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
    assert tokenizer.decode(_asked(tokenizer, "Who?")[0]) == "26 Jul 2024<user>Who?<a>"


def test_an_answer_has_no_more_room_than_the_model(tmp_path: Path):
    folder = save_tiny_llama(tmp_path / "short", max_position_embeddings=40)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    (row,) = answers(model, tokenizer, ["Who?", "x" * 60], 100)["answers"]  # the second one leaves none
    assert row["prompt"] == "Who?" and row["cut"] and len(row["text"]) <= 40 - len("Question: Who?\nAnswer:")


def test_what_was_trained_on_is_not_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_CHUNK", 7)  # it is found across the edges of what is searched at a time
    tokenizer = byte_tokenizer()
    trained = np.array(tokenizer("He asked: Who is there? Nobody said so.")["input_ids"], dtype=np.uint16)
    prompts = ["Who is there?", "Who is here?", "He asked:", "said so.", "said so. And then some more of it."]
    assert unseen(prompts, tokenizer, trained) == ["Who is here?", "said so. And then some more of it."]
    assert "trained on: Who is there?; He asked:; said so." in capsys.readouterr().err
    assert unseen(["Who is here?"], tokenizer, trained[:3]) == ["Who is here?"]
    assert not module._stands_in([], trained)


def test_answers_are_kept_with_the_point(tiny_llama: Path, tmp_path: Path):
    texts = Texts(prompts=["Who?"], answer_tokens=3)
    found = measure_texts(texts, tiny_llama, tmp_path, COMMON, "model", device="cpu")
    kept = json.loads((tmp_path / "answers.json").read_text())
    assert kept["answers"] == found["answers"]["answers"] and len(kept["answers"]) == 1
    write_json(tmp_path / "answers.json", kept | {"answers": "as they were"})
    kept = measure_texts(texts, tiny_llama, tmp_path, COMMON, "model", device="cpu")
    assert kept["answers"]["answers"] == "as they were"
    again = measure_texts(Texts(prompts=["Who?"], answer_tokens=4), tiny_llama, tmp_path, COMMON, "model", device="cpu")
    assert again["answers"]["answers"] != "as they were"
    assert "answers" not in measure_texts(Texts(), tiny_llama, tmp_path / "off", COMMON, "model", device="cpu")
    assert not (tmp_path / "off").exists()


def test_what_is_generated_follows_the_generation_config(tmp_path: Path):
    """A penalty for repetition changes answers and generated tasks, and no weight: what was measured is not of it."""
    model = save_tiny_llama(tmp_path / "model")
    generated, scored = (
        Prepared("x", None, {"output_type": [kind]}, 0) for kind in ("generate_until", "loglikelihood")
    )
    texts = Texts(prompts=["Who?"], answer_tokens=8)
    before = [identity_of(task, model) for task in (generated, scored)]
    measure_texts(texts, model, tmp_path, COMMON, "model", device="cpu")
    kept = json.loads((tmp_path / "answers.json").read_text())
    write_json(tmp_path / "answers.json", kept | {"answers": "as they were"})
    path = model / "generation_config.json"
    write_json(path, json.loads(path.read_text()) | {"repetition_penalty": 100.0})
    after = [identity_of(task, model) for task in (generated, scored)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True]
    again = measure_texts(texts, model, tmp_path, COMMON, "model", device="cpu")
    assert again["answers"]["answers"] != "as they were"


def test_the_report_shows_them_side_by_side(run_dir: Path):
    assert build_report(run_dir)["answers"] == []
    assert "What it says" not in (run_dir / "report.html").read_text()
    for point, text in (("before", "A <b>lake</b>."), ("converted", ""), ("after", "A | lake\nlake")):
        rows = [{"prompt": "What is blue?", "text": text, "cut": point == "after"}]
        rows += [{"prompt": "Asked once", "text": "x", "cut": False}] if point == "before" else []
        write_json(run_dir / "eval" / point / "answers.json", {"answers": rows})
    (row,) = build_report(run_dir)["answers"]
    assert row["prompt"] == "What is blue?" and list(row["answers"]) == ["before", "converted", "after"]
    text, html = (run_dir / "report.md").read_text(), (run_dir / "report.html").read_text()
    assert "| source | A &lt;b>lake&lt;/b>. |\n| converted | (nothing) |\n| uptrained | A \\| lake lake ... |" in text
    assert "A &lt;b&gt;lake&lt;/b&gt;." in html and "Asked once" not in html
