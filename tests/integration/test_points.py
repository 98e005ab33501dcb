"""All points of a run measured alike: one batch size, whatever happens, and several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cla_convert.cli import main
from cla_convert.errors import InputError
from cla_convert.evaluation import batch
from cla_convert.evaluation.harness import common_settings, evaluate
from cla_convert.evaluation.model import MeteredLM
from cla_convert.evaluation.points import Conditions, evaluate_points
from cla_convert.evaluation.texts import Texts, measure_texts
from cla_convert.recipe import Evaluate, TextFile
from tests.conftest import save_tiny_llama

SPEC = Evaluate(tasks=["arc_easy", "openbookqa"], limit=3, batch_size=8, max_length=256)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny_llama(root / name, seed=seed) for seed, name in enumerate(("before", "after"))}


def measure(models: dict[str, Path], out: Path, spec: Evaluate = SPEC, texts: Texts | None = None) -> dict:
    return evaluate_points(models, spec, Conditions(out, "cpu", 0, texts or Texts()))


def test_the_gpu_that_was_asked_for_is_used(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tasks and texts go to cuda:1, not to the first; which one it was is no part of the specification."""
    asked: list[str] = []

    class Asked(Exception):
        pass

    def loads(model_dir: Path, *, device: str, **options: object) -> None:
        asked.append(device)
        raise Asked

    monkeypatch.setattr("cla_convert.evaluation.model.load", loads)
    with pytest.raises(Asked):
        evaluate(models["before"], SPEC, tmp_path, device="cuda:1", seed=0)
    monkeypatch.setattr("cla_convert.evaluation.texts.load_where_it_fits", loads)
    common = common_settings(SPEC, "cuda:1", 0)
    with pytest.raises(Asked):
        texts = Texts(held_out=torch.zeros(1, 8, dtype=torch.long))
        measure_texts(texts, models["before"], tmp_path, common, "model", device="cuda:1")
    assert asked == ["cuda:1", "cuda:1"] and common == common_settings(SPEC, "cuda:0", 0)


def test_a_text_alone_has_the_perplexity_that_it_has_beside_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And by the command line no task is measured with it, unless it is named there, in --set or in a recipe."""
    (tmp_path / "my own.txt").write_text("She turned left at the mill, and left again. " * 20)
    text = TextFile(name="my-own", path=str(tmp_path / "my own.txt"))
    model, texts = save_tiny_llama(tmp_path / "model", max_position_embeddings=1024), Texts([text])
    beside = measure({"": model}, tmp_path / "beside", SPEC, texts)[""]["texts"]
    alone = measure({"": model}, tmp_path / "alone", Evaluate(tasks=[], perplexity=[text]), texts)[""]
    assert alone["texts"] == beside and alone["tasks"] == {}

    def told(*words: str) -> dict:
        line = ["cla-convert", "-q", "eval", str(model), "--set", "device=cpu", "--json", "--perplexity"]
        monkeypatch.setattr(sys, "argv", [*line, text.path, *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return json.loads(capsys.readouterr().out)

    assert told()["texts"] == beside and told()["tasks"] == {}
    named = told("--set", "eval.tasks=[arc_easy]", "--limit", "2")
    assert named["texts"] == beside and list(named["tasks"]) == ["arc_easy"]
    assert list(told("--tasks", "openbookqa", "--limit", "2")["tasks"]) == ["openbookqa"]


def full_device(monkeypatch: pytest.MonkeyPatch, limit: int, only: str = "") -> list[int]:
    """A device that is full with more than `limit` rows (of the model in the folder `only`); the batches it saw."""
    seen: list[int] = []
    original = MeteredLM._model_call

    def call(self, inps, *arguments, **options):
        seen.append(len(inps))
        if len(inps) > limit and self.model.name_or_path.endswith(only):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, inps, *arguments, **options)

    monkeypatch.setattr(MeteredLM, "_model_call", call)
    return seen


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    full_device(monkeypatch, limit=3, only="after")
    original = torch.log_softmax

    def log_softmax(logits, dim):
        if len(logits) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(logits, dim=dim)

    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"batch size 8(.|\n)*eval.batch_size=2 "):
        patch.setattr(torch, "log_softmax", log_softmax)  # what the probe computes
        measure(models, tmp_path)
    results = measure(models, tmp_path, SPEC.model_copy(update={"batch_size": 2}))
    assert {name: result["specification"]["batch_size"] for name, result in results.items()} == {
        "before": 2,
        "after": 2,
    }
    assert len({result["specification_hash"] for result in results.values()}) == 1
    record = json.loads((tmp_path / "batch_size.json").read_text())
    assert (record["batch_size"], record["requested"], record["found"]) == (2, 2, "given")


def test_a_single_sequence_that_does_not_fit_is_refused_in_words(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    full_device(monkeypatch, limit=0)
    with pytest.raises(InputError, match=r"too little memory for a single sequence(.|\n)*eval.max_length"):
        measure(models, tmp_path, SPEC.model_copy(update={"batch_size": 1}))
    with pytest.raises(InputError, match="single sequence"):  # rolling windows are single ones anyway
        measure(models, tmp_path / "rolling", Evaluate(tasks=["wikitext"], limit=1, max_length=256))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shape"), batch.out_of_memory():
        raise RuntimeError("shape mismatch")


def test_auto_is_found_once_on_the_source(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    probed: list[Path] = []

    def probe(model_dir: Path, *_arguments) -> int:
        probed.append(model_dir)
        return 4

    monkeypatch.setattr(batch, "_probe", probe)
    spec = SPEC.model_copy(update={"batch_size": "auto"})
    for _ in range(2):
        size = batch.settle(spec, models["before"], tmp_path, "cuda:0")
        assert size == 4
    assert probed == [models["before"]]  # the second time it is on record
    results = measure(models, tmp_path / "cpu", spec)
    assert results["after"]["specification"]["batch_size"] == batch.ON_CPU
    assert json.loads((tmp_path / "cpu" / "batch_size.json").read_text())["found"] == "default"
    assert len(probed) == 1


def test_the_probe_halves_until_it_fits(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    original = torch.log_softmax

    def log_softmax(logits, dim):
        sizes.append(len(logits))
        if len(logits) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(logits, dim=dim)

    monkeypatch.setattr(torch, "log_softmax", log_softmax)
    assert batch._probe(models["before"], 32, "cpu") == 16
    assert sizes == [64, 32, 16]


def test_two_processes_share_the_work_and_give_the_same_results(models: dict[str, Path], tmp_path: Path):
    words = ["eval", str(models["before"]), "--tasks", "arc_easy,passkey,wikitext", "--limit", "3", "--json"]
    for setting in ("eval.max_length=450", "eval.retrieval.lengths=[450]", "eval.retrieval.samples=1", "device=cpu"):
        words += ["--set", setting]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    outputs = []
    for name, command in (("one", [sys.executable]), ("two", launch)):
        done = subprocess.run(
            [*command, "-m", "cla_convert.cli", *words, "--out", str(tmp_path / name)],
            capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads(done.stdout))  # one object: one process speaks
    assert [output["specification"]["processes"] for output in outputs] == [1, 2]
    for task in ("arc_easy", "passkey", "wikitext"):
        one, two = (
            json.loads((tmp_path / n / "tasks" / f"{task}.json").read_text())["samples"] for n in ("one", "two")
        )
        assert [sample["doc_hash"] for sample in one] == [sample["doc_hash"] for sample in two]
        for metric, value in outputs[0]["tasks"][task].items():
            assert outputs[1]["tasks"][task][metric] == pytest.approx(value, rel=1e-5)
