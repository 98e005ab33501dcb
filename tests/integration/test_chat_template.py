"""Tasks asked with the model's chat template: what lm-eval itself asks and scores; what is refused, and what said."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers.utils import chat_template_utils

from cla_convert import console
from cla_convert.errors import InputError, UsageError
from cla_convert.evaluation import harness, prepare
from cla_convert.evaluation.chat_template import ChatTemplate
from cla_convert.evaluation.tasks import pack
from cla_convert.models.export import load_model, load_tokenizer
from cla_convert.recipe import Evaluate
from cla_convert.recipe_file import validate
from tests.conftest import byte_tokenizer, save_tiny_llama
from tests.launch import cla

TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}<{{ turn['role'] }}>\n{{ turn['content'] }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
EXAMPLES = [{"question": f"What is {n} plus {n}?", "answer": str(2 * n), "wrong": str(n)} for n in range(6)]
CHOSEN = f"""
custom_dataset: !function helpers.rows
test_split: test
description: "Add two numbers.\\n"
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
num_fewshot: 2
fewshot_config: {{sampler: first_n, samples: {json.dumps(EXAMPLES[3:])}}}
output_type: multiple_choice
doc_to_choice: "{{{{[answer, wrong]}}}}"
gen_prefix: "The answer is"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
task: chosen
"""
WRITTEN = """
include: chosen.yaml
output_type: generate_until
doc_to_choice: null
generation_kwargs: {until: ["</>"], max_gen_toks: 24, do_sample: false}
process_results: !function helpers.letters
metric_list: [{metric: letters, aggregation: mean, higher_is_better: true}]
task: written
"""
HELPERS = f"""
from cla_convert.evaluation.tasks.pack import Rows

def rows(**_): return {{"test": Rows({EXAMPLES[:3]!r})}}
def letters(doc, results): return {{"letters": float(sum(map(ord, results[0])))}}
"""
TASKS = ["arc_easy", "winogrande", "lambada_openai"]
"""Several answers to a prompt, an answer to several prompts, and one to one."""


def save(folder: Path, template: str | None = TEMPLATE, begins: bool = True, **overrides: Any) -> Path:
    """A tiny model whose tokenizer begins every text with BOS, as Llama's and Gemma's do."""
    save_tiny_llama(folder, max_position_embeddings=2048, **overrides)
    tokenizer = byte_tokenizer()
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
        )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny") / "instruct")


def evaluate(model: Path, out: Path, **settings: Any) -> dict[str, Any]:
    spec = Evaluate(**{"tasks": TASKS, "limit": 3, "chat_template": True, "max_length": 2048, **settings})
    return harness.evaluate(model, spec, out, device="cpu", seed=0)


def plain_lm_eval(model: Path, tasks: list[str], folders: list[Path], **settings: Any) -> dict[str, Any]:
    """What `lm_eval --apply_chat_template` gives, through lm-eval's own model class."""
    lm = HFLM(
        pretrained=load_model(model, dtype="float32", device="cpu"),  # pyright: ignore[reportArgumentType]
        tokenizer=load_tokenizer(model), batch_size=3, max_length=2048,
    )  # fmt: skip
    found: Any = lm_eval.simple_evaluate(
        lm, tasks=tasks, task_manager=TaskManager(include_path=[*map(str, folders)], include_defaults=False), limit=3,
        apply_chat_template=True, fewshot_as_multiturn=True, fewshot_random_seed=0, log_samples=True,
        bootstrap_iters=0, **settings,
    )  # fmt: skip
    return found


@pytest.mark.parametrize("fewshot", [None, 2])
@pytest.mark.parametrize("begins", [True, False])
def test_prompts_and_scores_are_lm_evals_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fewshot: int | None, begins: bool
):
    monkeypatch.setattr(prepare, "_leave_itself_out", lambda _task: None)  # lm-eval asks a document of itself
    model = save(tmp_path / "model", begins=begins)
    ours = evaluate(model, tmp_path / "out", num_fewshot=fewshot)
    theirs = plain_lm_eval(model, TASKS, [pack.FOLDER], num_fewshot=fewshot)
    for task in TASKS:
        samples = json.loads((tmp_path / "out" / "tasks" / f"{task}.json").read_text())["samples"]
        for mine, other in zip(samples, theirs["samples"][task], strict=True):
            assert mine["prompt_hash"] == other["prompt_hash"]
            likelihoods = mine.get("loglikelihoods") or [mine["metrics"]["perplexity"]]
            assert likelihoods == pytest.approx([answer[0] for answer in other["filtered_resps"]], abs=1e-3)
        for metric, value in ours["tasks"][task].items():
            assert value == pytest.approx(theirs["results"][task][f"{metric},none"], rel=1e-4)


@pytest.mark.parametrize("template", [TEMPLATE, NO_SYSTEM])
def test_own_tasks_are_asked_as_lm_eval_asks_them(tmp_path: Path, template: str):
    """With a description, examples, the start of an answer, and answers that are written."""
    (tmp_path / "mine").mkdir()
    for name, text in {"chosen.yaml": CHOSEN, "written.yaml": WRITTEN, "helpers.py": HELPERS}.items():
        (tmp_path / "mine" / name).write_text(text)
    model, tasks = save(tmp_path / "model", template), ["chosen", "written"]
    evaluate(model, tmp_path / "out", tasks=tasks, include_path=str(tmp_path / "mine"))
    theirs = plain_lm_eval(model, tasks, [tmp_path / "mine"])
    for task in tasks:
        samples = json.loads((tmp_path / "out" / "tasks" / f"{task}.json").read_text())["samples"]
        for mine, other in zip(samples, theirs["samples"][task], strict=True):
            assert mine["prompt_hash"] == other["prompt_hash"]
            assert mine["metrics"] == {name: other[name] for name in mine["metrics"]}
    prompt = theirs["samples"]["written"][0]["arguments"][0][0]
    assert prompt.count("<assistant>\nThe answer is") == 3
    assert prompt.endswith("The answer is")
    assert ("<system>\nAdd two numbers." in prompt) == (template == TEMPLATE)


def test_a_prompt_begins_once_and_ends_where_the_answer_begins(instruct: Path):
    spec = Evaluate(tasks=["arc_easy"], limit=1, chat_template=True, num_fewshot=1)
    task = prepare.prepare(spec, 0, instruct)[0].tasks["tasks"]["arc_easy"]
    prompt, answer = task.instances[0].args
    turns = [part.split(">\n")[0] for part in prompt.split("\n<")]
    assert turns == ["<|bos|><user", "assistant", "user", "assistant"]
    assert prompt.endswith("</>\n<assistant>\n")
    assert not answer.startswith(" ")
    lm: Any = HFLM(pretrained=load_model(instruct, device="cpu"), tokenizer=load_tokenizer(instruct))  # pyright: ignore
    assert lm.tok_encode(prompt).count(0) == 1


def test_what_is_asked_otherwise_is_another_specification(instruct: Path, tmp_path: Path):
    asked = {
        "plainly": {"chat_template": False},
        "in turns": {},
        "of another": {"chat_template_args": {"enable_thinking": False}},
    }
    other = save(tmp_path / "other", TEMPLATE.replace("</>", "<end>"))
    found = {name: evaluate(instruct, tmp_path / name, tasks=["piqa"], **settings) for name, settings in asked.items()}
    found["with other marks"] = evaluate(other, tmp_path / "marks", tasks=["piqa"])
    assert len({result["specification_hash"] for result in found.values()}) == 4
    samples = [json.loads((tmp_path / name / "tasks" / "piqa.json").read_text())["samples"][0] for name in asked]
    assert len({sample["prompt_hash"] for sample in samples}) == 2  # this template does not look at the argument


def test_what_is_no_question_stays_plain_text(instruct: Path, tmp_path: Path):
    tasks = {"tasks": ["wikitext", "passkey"], "limit": 1, "limits": {"passkey": 2}, "retrieval": {"lengths": [512]}}
    plain, in_turns = (evaluate(instruct, tmp_path / str(on), chat_template=on, **tasks) for on in (False, True))
    assert plain["specification_hash"] == in_turns["specification_hash"]
    assert plain["tasks"] == in_turns["tasks"]


@pytest.mark.parametrize(
    ("template", "settings", "told"),
    [
        (None, {}, "the tokenizer has no chat template"),
        ("{{ raise_exception('never') }}", {}, "cannot put a task's questions into turns\nTemplateError: never"),
        ("{{ messages[", {}, "cannot put a task's questions into turns\nTemplateSyntaxError"),
        (TEMPLATE, {"chat_template_args": {"tokenize": True}}, "into turns\nTypeError"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_before_the_work(
    tmp_path: Path, template: str | None, settings: dict[str, Any], told: str
):
    model = save(tmp_path / "model", template)
    with pytest.raises(InputError, match=told):
        harness.check_tasks(Evaluate(tasks=["piqa"], limit=1, chat_template=True, **settings), model)
    harness.check_tasks(Evaluate(tasks=["piqa"], limit=1), model)


def test_arguments_need_a_template():
    with pytest.raises(UsageError, match="chat_template is false"):
        validate({"eval": {"chat_template_args": {"enable_thinking": False}}})


def test_a_day_that_is_named_is_always_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    template = ChatTemplate.of(save(tmp_path / "model", DATED), {})
    said = []
    for day in (datetime(2025, 1, 1), datetime(2026, 6, 1)):
        frozen = type("Frozen", (datetime,), {"now": classmethod(lambda cls, tz=None, day=day: day)})
        monkeypatch.setattr(chat_template_utils, "datetime", frozen)
        turns = [{"role": "user", "content": "Hello"}]
        assert str(template.tokenizer.apply_chat_template(turns, tokenize=False)).startswith(day.strftime("%d %b %Y"))
        said.append(template(turns))
    assert said[0] == said[1]
    assert said[0].startswith("26 Jul 2024")


def test_a_template_without_a_system_turn_is_asked_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    template = ChatTemplate.of(save(tmp_path / "model", NO_SYSTEM), {})
    user = {"role": "user", "content": "Hello"}
    console.TOLD.clear()  # once in a process
    assert template([{"role": "system", "content": "Be kind."}, user]) == template([user])
    assert "takes no system turn" in capsys.readouterr().err


def test_the_command_line_and_the_report(instruct: Path, tmp_path: Path):
    """`eval` says it, `run` refuses a model without a template before work, and its report says it."""
    done = cla("eval", instruct, "--tasks", "piqa,wikitext", "--limit", 1, "--set", "eval.chat_template=true")
    assert done.returncode == 0, done.stderr
    assert "asked with the chat template\nspecification" in done.stdout
    recipe = {
        "source": {"model": str(instruct)},
        "convert": {"sharing": "cla2", "init": "mean"},
        "train": {"tokens": 0},
        "eval": {"tasks": ["piqa", "wikitext"], "limit": 2, "domain_tokens": 0, "agreement_tokens": 0, "prompts": []}
        | {"chat_template": True},
        "device": "cpu",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = cla("run", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "by the model's chat template (piqa)" in " ".join(report["caveats"])
    assert "differ in" not in " ".join(report["caveats"])
    assert report["tasks"]["piqa"]["acc"]["delta"] is not None
    assert "asked in turns by the model's chat template" in (tmp_path / "run" / "report.md").read_text()
    assert "| acc, with chat template, % |" in (tmp_path / "run" / "converted" / "README.md").read_text()
    plain = save(tmp_path / "plain", None)
    done = cla("run", tmp_path / "recipe.yaml", "--out", tmp_path / "no", "--set", f"source.model={plain}")
    assert done.returncode == 3
    assert "the tokenizer has no chat template" in done.stderr
    assert not (tmp_path / "no" / "converted").exists()
