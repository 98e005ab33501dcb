"""A folder of the user's own lm-eval tasks: run, compared, hashed; and what is wrong with it said before any work."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cla_convert.errors import ClaError
from cla_convert.evaluation import harness
from cla_convert.evaluation.prepare import prepare
from cla_convert.recipe import Evaluate
from tests.conftest import save_tiny_llama
from tests.launch import cla

ROWS = [{"question": f"What is {n} plus {n}?", "right": str(2 * n), "wrong": str(n)} for n in range(6)]
SUMS = """
task: sums
tag: mine
custom_dataset: !function helpers.rows
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{[right, wrong]}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""
WRITTEN = """
include: sums.yaml
task: written
output_type: generate_until
description: "Add. "
doc_to_choice: null
doc_to_target: "{{right}}"
process_results: !function helpers.score
metric_list: [{metric: exact, aggregation: mean, higher_is_better: true}]
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
filter_list: [{name: number, filter: [{function: regex, regex_pattern: "([0-9]+)"}, {function: take_first}]}]
"""
HELPERS = f"""
from cla_convert.evaluation.tasks.pack import Rows

def rows(**_): return {{"test": Rows({ROWS!r})}}
def score(doc, results): return {{"exact": float(results[0] == doc["right"])}}
def total(items): return len(sum(items))
def too_few(items): return 1 / (len(items) - 2)
def no_such_key(items): return dict(enumerate(items))[2]
"""
GROUP = "group: arithmetic\ntask: [sums, piqa]\naggregate_metric_list: [{metric: acc, weight_by_size: false}]\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine" / "more").mkdir(parents=True)
    files = {"sums.yaml": SUMS, "written.yaml": WRITTEN, "helpers.py": HELPERS, "more/group.yaml": GROUP}
    for name, text in files.items():
        (tmp_path / "mine" / name).write_text(text)
    return tmp_path / "mine"


def spec(folder: Path, *tasks: str, **settings: Any) -> Evaluate:
    return Evaluate(tasks=[*tasks], include_path=str(folder), **settings)


def frozen(folder: Path, *tasks: str) -> dict[str, dict[str, Any]]:
    return {task.name: task.frozen for task in prepare(spec(folder, *tasks), 0)}


def test_own_tasks_through_the_command_line(folder: Path, tmp_path: Path):
    """Before and after a conversion, beside a task of the pack; and alone."""
    model = save_tiny_llama(tmp_path / "model", max_position_embeddings=1024)
    recipe = {
        "source": {"model": str(model)},
        "convert": {"sharing": "cla2", "init": "mean"},
        "train": {"tokens": 0},
        "eval": {"tasks": ["mine", "written", "arithmetic"], "include_path": str(folder), "limit": 12}
        | {"domain_tokens": 0, "agreement_tokens": 0, "prompts": []},
        "device": "cpu",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = cla("run", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(report["tasks"]) == ["sums", "written", "arithmetic"]
    assert report["tasks"]["written"]["exact,number"]["delta"] is not None
    row = report["tasks"]["arithmetic"]["acc"]  # 6 and 12 rows, which weigh the same
    assert row["delta"] == pytest.approx(row["converted"] - row["before"])
    assert row["ci95"]
    task = json.loads((tmp_path / "run" / "eval" / "before" / "tasks" / "arithmetic.json").read_text())
    means = [one["acc"] for one in task["subtasks"].values()]
    assert row["before"] == row["before_paired"] == pytest.approx(sum(means) / 2)
    assert task["equal_weights"] == ["acc"]
    done = cla("eval", model, "--include-path", folder, "--tasks", "sums", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["specification"]["tasks"]["sums"]["source"] == "own task"


def test_a_folder_of_data_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    changes = {"custom_dataset": None, "dataset_path": "json"}
    changes |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    (folder / "filed.yaml").write_text(yaml.safe_dump({"include": "sums.yaml", "task": "filed", "tag": None} | changes))
    found = frozen(folder, "sums", "filed")
    assert found["filed"]["n"] == 6
    assert found["filed"]["rows"] != found["sums"]["rows"]  # the name is part of it


def test_other_rows_for_a_task_of_ones_own(folder: Path, tmp_path: Path):
    (tmp_path / "sets" / "sums").mkdir(parents=True)
    (tmp_path / "sets" / "sums" / "test.jsonl").write_text(json.dumps(ROWS[0]))
    found = prepare(spec(folder, "sums", task_data=str(tmp_path / "sets")), 0)[0].frozen
    assert (found["n"], found["source"]) == (1, "local files")
    assert found["files"] == frozen(folder, "sums")["sums"]["files"]
    assert found["rows"] != frozen(folder, "sums")["sums"]["rows"]


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("sums.yaml", "doc_to_target: 0", "doc_to_target: 1", {"sums", "written", "arithmetic"}),  # no prompt changes
        ("written.yaml", "[0-9]+", "[0-9]", {"written"}),
        ("helpers.py", "float(results", "2 * float(results", {"sums", "written", "arithmetic"}),
        ("helpers.py", "'right': '4'", "'right': '5'", {"sums", "written", "arithmetic"}),
        ("more/group.yaml", "false", "true", {"arithmetic"}),
    ],
)
def test_whatever_a_task_is_made_of_is_in_its_specification(
    folder: Path, file: str, old: str, new: str, changed: set[str]
):
    tasks = "sums", "written", "arithmetic"
    before, again = frozen(folder, *tasks), frozen(folder, *tasks)
    assert before == again
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    after = frozen(folder, *tasks)
    assert {name for name in tasks if before[name] != after[name]} == changed


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ("[mine]", "sums"),
        ("[{group: inner, task: [sums], aggregate_metric_list: [{metric: acc}]}]", "sums"),
        ("[piqa]", "piqa"),
    ],
)
def test_a_group_is_made_of_what_it_reaches_by_any_way(folder: Path, parts: str, named: str):
    """By a tag, by a group that is written out in it, or by the name of a task that it replaces."""
    (folder / "more" / "group.yaml").write_text(
        f"group: all\ntask: {parts}\naggregate_metric_list: [{{metric: acc}}]\n"
    )
    if named == "piqa":
        (folder / "piqa.yaml").write_text(SUMS.replace("task: sums", "task: piqa").replace("tag: mine", ""))
    before, file = frozen(folder, "all")["all"], folder / f"{named}.yaml"
    file.write_text(file.read_text().replace("doc_to_target: 0", "doc_to_target: 1"))
    after = frozen(folder, "all")["all"]
    assert before["prompts"] == after["prompts"]
    assert before["files"] != after["files"]


def test_the_specification_does_not_depend_on_where_the_folder_lies(folder: Path):
    before = frozen(folder, "sums", "arithmetic")
    assert before == frozen(folder.rename(folder.parent / "elsewhere"), "sums", "arithmetic")
    assert {"files", "rows"} & prepare(Evaluate(tasks=["piqa"], limit=1), 0)[0].frozen.keys() == set()


def test_a_task_of_ones_own_replaces_that_of_the_pack(folder: Path):
    (folder / "piqa.yaml").write_text(SUMS.replace("task: sums", "task: piqa").replace("tag: mine", ""))
    found = frozen(folder, "piqa", "arithmetic")
    assert (found["piqa"]["source"], found["piqa"]["n"]) == ("own task", 6)
    assert found["arithmetic"]["n"] == 12


def test_a_group_may_have_stock_tasks(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "mixed.yaml").write_text(GROUP.replace("arithmetic", "mixed").replace("piqa", "sciq"))
    with pytest.raises(ClaError, match="'mixed' of .*mixed.yaml cannot be used") as caught:
        frozen(folder, "mixed")
    assert "sciq" in str(caught.value)  # lm-eval knows it, and its rows are on the hub


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("new.yaml", "task: [sums\noutput_type", r"new.yaml cannot be read\nline 2: "),
        ("new.yaml", "- a list", "new.yaml cannot be read\nIt holds no settings"),
        ("new.yaml", "task: !python/name:os.system x", "new.yaml cannot be read\nline 1: could not determine"),
        ("new.yaml", "include: nowhere.yaml\ntask: new", r"nowhere.yaml, which .*new.yaml includes, cannot be read"),
        ("new.yaml", "include: new.yaml\ntask: new", "new.yaml includes itself"),
        (
            "new.yaml",
            "include: [sums.yaml, written.yaml]\ntask: new\ntag: null",
            "does not read .*new.yaml\n.*by two ways",
        ),
        ("new.yaml", "task: sums", "The task 'sums' is declared twice"),
        ("new.yaml", "task: a/b", "'a/b' in .*new.yaml cannot be the name of a task"),
        ("new.yaml", "task: [sums]", "cannot be the name of a task"),
        ("new.yaml", 'task: "a\\0b"', "cannot be the name of a task"),
        ("new.yaml", f"task: {'long' * 60}", "cannot be the name of a task"),
        ("new.yaml", "task: new\ninclude: [[sums.yaml]]", "which is no file"),
        ("new.yaml", "[" * 50_000, "new.yaml cannot be read"),
        ("new.yaml", "task: passkey", "declares 'passkey', which is a task of cla-convert"),
        ("sums.yaml", SUMS.replace("helpers.rows", "helpers.lines"), "sums.yaml cannot be used\nAttributeError"),
        ("sums.yaml", SUMS.replace("doc_to_text:", "doc_to_texts:"), "sums.yaml cannot be used\nTypeError"),
        ("sums.yaml", SUMS.replace("{{question}}", "{{question"), "sums.yaml cannot be used\nTemplateSyntaxError"),
        ("sums.yaml", SUMS.replace("metric: acc", "metric: acccc"), "used\nValueError: there is no metric acccc"),
        ("sums.yaml", SUMS.replace("aggregation: mean", "aggregation: meen"), "used\nValueError: there is no such"),
        (
            "sums.yaml",
            SUMS.replace('"{{[right, wrong]}}"', '["{{right}}", "{{wrong}}"]'),
            "used\nValueError: doc_to_choice",
        ),
        ("sums.yaml", SUMS + "unsafe_code: true\n", "runs code that the model writes"),
        ("helpers.py", HELPERS.replace('doc["right"]', 'doc["nothing"]'), "written.yaml cannot be used\nKeyError"),
        (
            "helpers.py",
            HELPERS.replace('{"exact":', '{"each": [True, False], "exact":'),
            "written.yaml cannot be used\nValueError: process_results gives the metric each, which has no aggregation",
        ),
        (
            "written.yaml",
            WRITTEN.replace("aggregation: mean", "aggregation: !function helpers.total"),
            "written.yaml cannot be used\nTypeError",
        ),
        ("helpers.py", "def rows(:", "sums.yaml cannot be used\nSyntaxError"),
    ],
)
def test_mistakes_are_said_before_any_work(folder: Path, file: str, text: str, told: str):
    (folder / file).write_text(text)
    with pytest.raises(ClaError, match=told):
        harness.check_tasks(spec(folder, "sums", "written"))


@pytest.mark.parametrize("name", ["too_few", "no_such_key"])
def test_an_aggregation_that_wants_other_documents_is_no_mistake(folder: Path, name: str):
    (folder / "written.yaml").write_text(WRITTEN.replace("aggregation: mean", f"aggregation: !function helpers.{name}"))
    harness.check_tasks(spec(folder, "written"))


def test_a_folder_of_which_nothing_is_named_is_said(folder: Path, capsys: pytest.CaptureFixture[str]):
    harness.check_tasks(spec(folder, "arithmetic", limit=1))
    assert capsys.readouterr().err.count("eval.tasks names none") == 0
    harness.check_tasks(spec(folder, "piqa", limit=1))
    assert "eval.tasks names none of the tasks in" in capsys.readouterr().err


def test_a_folder_that_is_none(folder: Path, tmp_path: Path):
    for place, told in ((tmp_path / "nowhere", "There is no folder"), (folder / "more" / "empty", "holds no tasks")):
        (folder / "more" / "empty").mkdir(exist_ok=True)
        with pytest.raises(ClaError, match=told):
            harness.check_tasks(spec(place, "sums"))
    with pytest.raises(ClaError, match=r"named 'summs'. Did you mean 'sums'"):
        harness.check_tasks(spec(folder, "summs"))


def test_generated_answers_are_scored(folder: Path, tmp_path: Path):
    """What the model writes reaches the user's filter and metric."""
    (folder / "helpers.py").write_text(HELPERS.replace('float(results[0] == doc["right"])', "float(len(results[0]))"))
    model = save_tiny_llama(tmp_path / "model")
    found = harness.evaluate(model, spec(folder, "written", limit=2), tmp_path / "out", device="cpu", seed=0)
    assert found["tasks"]["written"]["exact,number"] == len("[invalid]")  # a random model writes no numbers
