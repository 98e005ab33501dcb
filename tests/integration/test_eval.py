"""A tiny model through lm-eval: files per task, resume, cache, one specification, no network, no noise."""

import json
import math
import random
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import lm_eval.utils
import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import cla_convert.evaluation.model as model_module
from cla_convert.errors import InputError, UsageError
from cla_convert.evaluation import harness
from cla_convert.evaluation.backend import load_backend
from cla_convert.evaluation.cache import measure_kv_cache
from cla_convert.evaluation.harness import check_tasks, common_settings
from cla_convert.evaluation.model import MeteredLM
from cla_convert.evaluation.paired import compare
from cla_convert.evaluation.prepare import Prepared
from cla_convert.evaluation.room import check_answers_fit
from cla_convert.evaluation.tasks import pack
from cla_convert.models.export import load_model, load_tokenizer
from cla_convert.recipe import Evaluate
from tests.conftest import save_tiny_llama

SPEC = Evaluate(tasks=["arc_easy", "openbookqa", "wikitext"], limit=2, batch_size=4, max_length=256)


def evaluate(model: Path, out: Path, spec: Evaluate = SPEC, **options) -> dict:
    return harness.evaluate(model, spec, out, device="cpu", seed=0, **options)


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("eval") / "before"
    return out, evaluate(tiny_llama, out)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every model loaded for evaluation."""
    seen: list[Path] = []
    original = model_module.load

    def load(model_dir, **settings):
        seen.append(model_dir)
        return original(model_dir, **settings)

    monkeypatch.setattr(model_module, "load", load)
    return seen


def test_results_and_one_file_a_task(finished: tuple[Path, dict]):
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == results
    assert sorted(path.name for path in (out / "tasks").iterdir()) == [
        "arc_easy.json",
        "openbookqa.json",
        "wikitext.json",
    ]
    assert results["n"] == {"arc_easy": 2, "openbookqa": 2, "wikitext": 2}
    assert set(results["tasks"]["wikitext"]) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert set(results["stderr"]["arc_easy"]) == {"acc", "acc_norm"}
    task = json.loads((out / "tasks" / "arc_easy.json").read_text())
    assert [sample["doc_id"] for sample in task["samples"]] == [0, 1]
    mean = sum(sample["metrics"]["acc"] for sample in task["samples"]) / 2
    assert task["scores"]["acc"] == results["tasks"]["arc_easy"]["acc"] == mean
    assert {"doc_hash", "prompt_hash", "loglikelihoods", "target"} <= task["samples"][0].keys()


def test_wikitext_is_the_models_own_likelihood(finished: tuple[Path, dict], tiny_llama: Path):
    """Recomputed without lm-eval: windows of max_length, each token once, first context the BOS token."""
    model, tokenizer = load_model(tiny_llama, dtype="float32", device="cpu"), load_tokenizer(tiny_llama)
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    total, words = 0.0, 0
    for row in pack.read("wikitext")[:2]:
        ids = tokenizer(wikitext_detokenizer(row), add_special_tokens=False)["input_ids"]
        words += len(re.split(r"\s+", row["page"]))
        for start in range(0, len(ids), 256):
            target = ids[start : start + 256]
            # The last, shorter window is filled up with context from the left.
            context = [0] if start == 0 else ids[start + len(target) - 256 - 1 : start]
            with torch.no_grad():
                logits = model(torch.tensor([(context + target)[:-1]])).logits[0, -len(target) :]
            total += logits.log_softmax(-1).gather(-1, torch.tensor(target)[:, None]).sum().item()
    assert finished[1]["tasks"]["wikitext"]["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-4)


def test_finished_tasks_are_not_run_again(finished: tuple[Path, dict], tiny_llama: Path, tmp_path: Path, loads: list):
    out = tmp_path / "before"
    shutil.copytree(finished[0], out)
    again = evaluate(tiny_llama, out)
    assert loads == []
    assert again["tasks"] == finished[1]["tasks"]
    assert again["specification_hash"] == finished[1]["specification_hash"]


def test_after_a_crash_only_the_missing_tasks_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: tuple[Path, dict]
):
    ran: list[str] = []
    original = harness._run_task

    def run_task(task, *arguments):
        if task.name == "wikitext" and not ran.count("crashed"):
            ran.append("crashed")
            raise KeyboardInterrupt
        ran.append(task.name)
        return original(task, *arguments)

    monkeypatch.setattr(harness, "_run_task", run_task)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_llama, tmp_path)
    assert not (tmp_path / "results.json").exists()
    cut = tmp_path / "tasks" / "arc_easy.json"
    cut.write_text('{"task": "arc_easy", "iden')  # files appear whole: something else has damaged it
    with pytest.raises(InputError, match="cannot be read"):
        evaluate(tiny_llama, tmp_path)
    cut.unlink()
    results = evaluate(tiny_llama, tmp_path)
    assert ran == ["arc_easy", "openbookqa", "crashed", "arc_easy", "wikitext"]
    assert results["tasks"] == finished[1]["tasks"]


def test_another_model_or_specification_is_evaluated_anew(
    finished: tuple[Path, dict], tiny_llama: Path, tmp_path: Path, loads: list
):
    out = tmp_path / "eval"
    shutil.copytree(finished[0], out)
    other = save_tiny_llama(tmp_path / "other", seed=1)
    spec = Evaluate(**SPEC.model_dump() | {"tasks": ["arc_easy"]})
    results = evaluate(other, out, spec)
    assert loads == [other]
    changed = evaluate(tiny_llama, out, Evaluate(**spec.model_dump() | {"limit": 1}))
    assert loads == [other, tiny_llama]
    assert results["specification_hash"] != changed["specification_hash"]


def test_two_models_share_the_specification_and_can_be_paired(finished: tuple[Path, dict], tmp_path: Path):
    other = save_tiny_llama(tmp_path / "other", seed=1)
    results = evaluate(other, tmp_path / "after")
    assert results["specification_hash"] == finished[1]["specification_hash"]
    assert results["model_fingerprint"] != finished[1]["model_fingerprint"]
    for task in SPEC.tasks:
        files = [
            json.loads((folder / "tasks" / f"{task}.json").read_text()) for folder in (finished[0], tmp_path / "after")
        ]
        for comparison in compare(*files):
            expected = results["tasks"][task][comparison.metric] - finished[1]["tasks"][task][comparison.metric]
            assert comparison.delta == pytest.approx(expected, rel=1e-6)


def test_the_source_result_is_cached_by_content(tiny_llama: Path, tmp_path: Path, loads: list):
    spec = Evaluate(tasks=["openbookqa"], limit=2)
    first = evaluate(tiny_llama, tmp_path / "run1", spec, cache_dir=tmp_path / "cache")
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_llama, copy)
    second = evaluate(copy, tmp_path / "run2", spec, cache_dir=tmp_path / "cache")
    assert loads == [tiny_llama]
    assert second["tasks"] == first["tasks"]
    assert second["from_cache"] == ["openbookqa"]
    assert first["from_cache"] == []


def test_unknown_task_is_refused_before_the_model_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lm_eval.tasks import TaskManager

    original = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__",
        lambda self, include_path=None, include_defaults=True: original(
            self, include_path=include_path, include_defaults=False
        ),
    )  # fmt: skip
    with pytest.raises(UsageError, match="Did you mean 'boolq'"):
        evaluate(tmp_path / "no model here", tmp_path / "out", Evaluate(tasks=["bolq"]))
    assert not (tmp_path / "out").exists()


def test_no_network_and_no_noise(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def refuse(*_arguments):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    evaluate(tiny_llama, tmp_path / "out", Evaluate(tasks=["hellaswag", "boolq", "wikitext"], limit=1), label="before")
    output = capfd.readouterr()
    assert output.out == ""
    lines = [line for line in output.err.replace("\r", "\n").split("\n") if line.strip()]
    assert lines
    assert not [line for line in lines if not line.startswith(("eval before:", "warning: boolq: 2 requests"))]
    (line,) = lines  # no bar outside a terminal
    assert line == "warning: boolq: 2 requests exceed 512 tokens with their answers and lost their start"


def test_an_answer_longer_than_the_context_is_refused_in_words(tiny_llama: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"does not fit into the context of 16"):
        evaluate(tiny_llama, tmp_path, Evaluate(tasks=["piqa"], limit=1, max_length=16))


def test_answers_without_room_are_refused_before_the_work(tmp_path: Path):
    """Those to be scored, at the length where they begin to fit, and those to be generated."""
    model = save_tiny_llama(tmp_path / "model", max_position_embeddings=1024)

    def at(length: int) -> Evaluate:
        return Evaluate(tasks=["piqa"], limit=1, max_length=length)

    with pytest.raises(InputError, match="piqa: an answer of") as caught:
        check_tasks(at(20), model)
    longest = int(re.findall(r"\d+", caught.value.what)[0])
    with pytest.raises(InputError, match=f"does not fit into the context of {longest - 1}"):
        check_tasks(at(longest - 1), model)
    check_tasks(at(longest), model)
    evaluate(model, tmp_path / "out", at(longest))
    task = SimpleNamespace(instances=[SimpleNamespace(request_type="generate_until", args=("", {"until": ["."]}))])
    prepared = Prepared("qa", {"tasks": {"qa": task}}, {}, 0)
    with pytest.raises(InputError, match="qa: an answer of 257 tokens does not fit into the context of 256"):
        check_answers_fit([prepared], model, 256)
    check_answers_fit([prepared], model, 257)


def test_shortened_prompts_are_counted_and_said(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = evaluate(tiny_llama, tmp_path, Evaluate(tasks=["boolq", "openbookqa"], limit=1, max_length=64))
    assert found["truncated"]["boolq"] == 2
    assert json.loads((tmp_path / "tasks" / "boolq.json").read_text())["truncated"] == 2
    assert "boolq: 2 requests exceed 64 tokens" in capsys.readouterr().err


def test_shortened_prompts_of_generated_answers_are_counted_too(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Of 250 questions those that leave no room for 40 tokens; a byte is a token."""
    from lm_eval.tasks import TaskManager

    (tmp_path / "told.yaml").write_text(
        f"include: {pack.FOLDER / 'piqa.yaml'}\ntask: told\noutput_type: generate_until\ndoc_to_choice: null\n"
        'doc_to_target: "{{[sol1, sol2][label]}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 40}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    original = TaskManager.__init__

    def init(self, include_path=None, include_defaults=True):
        original(self, include_path=[str(tmp_path), *(include_path or [])], include_defaults=False)

    monkeypatch.setattr(TaskManager, "__init__", init)
    evaluate(tiny_llama, tmp_path / "out", Evaluate(tasks=["told"], limit=20, max_length=128))
    prompts = [f"Question: {row['goal']}\nAnswer:" for row in pack.read("piqa")[:20]]
    longer = sum(len(prompt.encode()) > 128 - 40 for prompt in prompts)
    assert 0 < longer < 20
    assert json.loads((tmp_path / "out" / "tasks" / "told.json").read_text())["truncated"] == longer
    assert f"told: {longer} requests exceed 128 tokens with their answers" in capsys.readouterr().err


def test_every_packed_task_runs(tmp_path: Path):
    model = save_tiny_llama(tmp_path / "model", max_position_embeddings=4096)
    results = evaluate(model, tmp_path / "out", Evaluate(limit=1))
    assert list(results["tasks"]) == Evaluate().tasks
    assert all(math.isfinite(value) for metrics in results["tasks"].values() for value in metrics.values())


def test_kv_cache_is_measured_on_live_tensors(tiny_llama: Path):
    found = measure_kv_cache(tiny_llama, device="cpu", tokens=16)
    per_token = 6 * 2 * 2 * 8 * 4  # layers, K and V, heads, channels, bytes of float32
    assert found["bytes_per_token"] == per_token
    assert found["measured_bytes"] == 16 * per_token
    assert (found["layers"], found["cached_layers"], found["sliding_layers"]) == (6, 6, 0)
    assert found["dtype"] == "float32"


@pytest.mark.parametrize("asked", [{"num_beams": 4}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_the_kv_cache_is_one_texts_however_a_model_says_that_it_generates(
    tiny_llama: Path, tmp_path: Path, asked: dict
):
    shutil.copytree(tiny_llama, tmp_path / "model")
    stated = tmp_path / "model/generation_config.json"
    stated.write_text(json.dumps(json.loads(stated.read_text()) | asked))
    found, plain = (measure_kv_cache(folder, device="cpu", tokens=16) for folder in (tmp_path / "model", tiny_llama))
    assert found == plain


def test_a_full_sliding_window_stops_growing(tmp_path: Path):
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, sliding_window=9, max_position_embeddings=256, bos_token_id=0,
        eos_token_id=1, pad_token_id=0,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    found = measure_kv_cache(tmp_path, device="cpu", tokens=32)
    assert (found["sliding_layers"], found["full_layers"], found["cached_layers"]) == (3, 3, 4)
    assert found["bytes_per_token"] == 2 * 8 * 4  # only the full-attention layer grows
    assert found["measured_bytes"] > 32 * found["bytes_per_token"]


@pytest.fixture(scope="module")
def mixed_requests() -> list[tuple[tuple[str, str], list[int], list[int]]]:
    """Contexts of 1 to 40 tokens, some with four answers of a token, some with longer ones; in no order."""
    draw = random.Random(0)
    contexts = [[draw.randrange(2, 258) for _ in range(draw.randint(1, 40))] for _ in range(60)]
    pairs = [
        (context, [draw.randrange(2, 258) for _ in range(length)])
        for context in contexts
        for length in draw.choice([[1] * 4, [3, 5]])
    ]
    draw.shuffle(pairs)
    return [((str(context), str(answer)), context, answer) for context, answer in pairs]


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_requests_that_go_together_by_their_tokens_are_scored_alike(
    tiny_llama: Path, mixed_requests: list, batch_size: int, monkeypatch: pytest.MonkeyPatch
):
    """As on an accelerator: no more tokens at a time than are allowed, every row once, the same answers."""
    shapes: list[tuple[int, int]] = []
    original = MeteredLM._model_call
    monkeypatch.setattr(
        MeteredLM, "_model_call", lambda lm, ids: (shapes.append(tuple(ids.shape)), original(lm, ids))[1]
    )
    model, tokenizer = load_model(tiny_llama, dtype="float32", device="cpu"), load_tokenizer(tiny_llama)
    alone = MeteredLM(model, tokenizer, batch_size=1, context=32)
    wanted = alone._loglikelihood_tokens(mixed_requests)
    rows, shapes[:] = sum(count for count, _ in shapes), []
    lm = MeteredLM(model, tokenizer, batch_size=batch_size, context=32, logits=128 * model.config.vocab_size)
    found = lm._loglikelihood_tokens(mixed_requests)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=1e-4)
    most = min(128, batch_size * 32)
    assert all(count * length <= most or count == 1 for count, length in shapes), shapes
    assert sum(count for count, _ in shapes) == rows
    assert len(shapes) < rows * 25 / most
    assert lm.truncated == alone.truncated > 0
    texts = [Instance("loglikelihood_rolling", {}, ("word " * count,), 0) for count in (3, 40, 90)]
    shapes.clear()
    assert lm.loglikelihood_rolling(texts) == pytest.approx(alone.loglikelihood_rolling(texts), abs=1e-3)
    assert max(count for count, _ in shapes) == most // 32


@pytest.mark.parametrize("logits", [0, 2**20])
def test_the_same_tokens_may_be_divided_anywhere_into_context_and_answer(tiny_llama: Path, logits: int):
    """lm-eval takes them for one row, and the scores of the shorter answer from the wrong end of it."""
    model, tokenizer = load_model(tiny_llama, dtype="float32", device="cpu"), load_tokenizer(tiny_llama)
    lm = MeteredLM(model, tokenizer, batch_size=8, context=32, logits=logits)
    tokens = list(range(2, 22))
    requests = [(None, tokens[:at], [*tokens[at:], last]) for at in (5, 12, 19) for last in (30, 40)]
    alone = [lm._loglikelihood_tokens([request])[0][0] for request in requests]
    assert [score for score, _ in lm._loglikelihood_tokens(requests)] == pytest.approx(alone, abs=1e-4)


def test_requests_go_together_as_the_specification_says(tiny_llama: Path):
    one, other = (common_settings(SPEC, device, 0) for device in ("cpu", "cuda:1"))
    assert one["rolling_batch_size"] == 1 and other["logits_at_once"] > 0
    assert "logits_at_once" not in one
    for common, together in ((one, 0), (other, SPEC.batch_size * SPEC.max_length)):
        assert load_backend(tiny_llama, SPEC, common, "cpu", None).together == together


def test_templates_are_compiled_once(monkeypatch: pytest.MonkeyPatch):
    """lm-eval compiles them for every prompt, choice and answer of every row: most of the time of building a task."""
    compiled: list[str] = []
    templates = lm_eval.utils.env
    original = templates.compile
    monkeypatch.setattr(
        templates,
        "compile",
        lambda text, *more, **options: (compiled.append(text), original(text, *more, **options))[1],
    )
    check_tasks(Evaluate(tasks=["openbookqa", "boolq"], limit=37))
    assert compiled and len(compiled) == len(set(compiled))
