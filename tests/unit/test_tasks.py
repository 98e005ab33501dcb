"""The offline pack is the stock tasks on fewer rows: every prompt, target and metric is compared with lm-eval's own."""

import hashlib
import json
import logging
import pickle
import re
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from cla_convert.errors import InputError, UsageError
from cla_convert.evaluation.harness import check_tasks
from cla_convert.evaluation.prepare import prepare
from cla_convert.evaluation.quiet import quiet
from cla_convert.evaluation.stock_tasks import manager_for
from cla_convert.evaluation.tasks import pack
from cla_convert.recipe import Evaluate, TextFile

STOCK = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=str(pack.FOLDER), include_defaults=False)


def stock_task(name: str) -> ConfigurableTask:
    """lm-eval's own task, fed with the shipped rows under every split name that it asks for."""
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / STOCK[name])
    config.pop("tag", None)
    split = config.get("test_split") or config["validation_split"]
    config |= {"training_split": None, "dataset_kwargs": {"file": name, "split": split}, "custom_dataset": pack.rows}
    config["validation_split"] = split if split == config.get("validation_split") else None
    return ConfigurableTask(config=config)


def requests(task: ConfigurableTask) -> list[tuple]:
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(rank=0, world_size=1)
    return [(instance.doc_id, instance.request_type, instance.args) for instance in task.instances]


def test_stock_tasks_are_found_without_reading_all_of_them(capsys: pytest.CaptureFixture[str]):
    """As lm-eval knows them: a task, and tags."""
    names = {"arc_challenge", "ai2_arc", "truthfulqa"}
    found = manager_for(names, [])
    assert "the list of all stock tasks" not in capsys.readouterr().err
    folder = Path(lm_eval.tasks.__file__).parent
    theirs = TaskManager(include_path=[str(folder / name) for name in ("arc", "truthfulqa")], include_defaults=False)
    for name in names:
        assert str(found.task_index[name].cfg) == str(theirs.task_index[name].cfg)
        assert found.task_index[name].tags == theirs.task_index[name].tags


@pytest.mark.parametrize(("wrong", "meant"), [("pika", "piqa"), ("need1e", "needle"), ("mmlu_anatmy", "mmlu_anatomy")])
def test_of_tasks_with_a_like_name_those_of_the_pack_are_suggested_first(wrong: str, meant: str):
    with pytest.raises(UsageError, match=f"named '{wrong}'. Did you mean '{meant}'"):
        prepare(Evaluate(tasks=[wrong]), 0)


def test_every_stock_name_is_shipped():
    assert pack.names() == sorted(STOCK)


@pytest.mark.parametrize("name", STOCK)
def test_prompts_targets_and_metrics_equal_the_stock_task(name: str, manager: TaskManager):
    with quiet():
        ours, stock = manager.load([name])["tasks"][name], stock_task(name)
        assert requests(ours) == requests(stock)
        targets = [[task.doc_to_target(doc) for doc in task.eval_docs] for task in (ours, stock)]
        documents = list(ours.eval_docs)
    assert targets[0] == targets[1]
    assert ours.aggregation() == stock.aggregation()
    assert ours.higher_is_better() == stock.higher_is_better()
    assert ours.VERSION == stock.VERSION
    for doc in documents[:20]:
        choices = len(ours.doc_to_choice(doc)) if ours.OUTPUT_TYPE == "multiple_choice" else 1
        answers = [-7.0] if name == "wikitext" else [(-1.0 - i, False) for i in range(choices)]
        assert ours.process_results(doc, answers) == stock.process_results(doc, answers)


def test_the_pack_needs_no_fingerprint_of_its_rows(manager: TaskManager, monkeypatch: pytest.MonkeyPatch):
    """`datasets` pickles what it hashes, and fails at pyarrow where the package lies outside of site-packages."""

    def hash(_self, _value):
        raise pickle.PicklingError("Can't pickle <class 'MonthDayNano'>")

    monkeypatch.setattr(datasets.fingerprint.Hasher, "hash", hash)
    with pytest.raises(pickle.PicklingError):
        datasets.Dataset.from_list([{"a": 1}])
    for name, task in manager.load(pack.names())["tasks"].items():
        assert len(task.eval_docs) == len(pack.read(name))


def test_rows_are_those_that_the_readme_lists():
    table = dict(
        re.findall(r"^\| (\w+) \| \d+ of \d+ \| \d+ \| `(\w{64})` \|$", (pack.FOLDER / "README.md").read_text(), re.M)
    )
    assert sorted(table) == pack.names()
    for name, digest in table.items():
        assert hashlib.sha256((pack.FOLDER / f"{name}.jsonl").read_bytes()).hexdigest() == digest
        assert len(pack.read(name)) == (62 if name == "wikitext" else 250)
    assert sum(path.stat().st_size for path in pack.FOLDER.glob("*.jsonl")) < 2_500_000


def test_wikitext_is_complete_and_shortest_first():
    lengths = [len(row["page"]) for row in pack.read("wikitext")]
    assert lengths == sorted(lengths)
    assert sum(len(row["page"].encode()) for row in pack.read("wikitext")) == 1_290_590  # the official wiki.test.raw


def test_preparing_freezes_what_is_measured_and_respects_the_limit():
    first, again, more = (prepare(Evaluate(tasks=["piqa"], limit=n), seed=0)[0] for n in (3, 3, 4))
    assert first.frozen == again.frozen
    assert (first.frozen["n"], first.frozen["requests"], first.frozen["source"]) == (3, 6, "offline pack")
    assert first.frozen["prompts"] != more.frozen["prompts"]


def test_a_task_may_have_its_own_limit():
    found = prepare(Evaluate(tasks=["piqa", "wikitext"], limit=6, limits={"wikitext": 2}), seed=0)
    assert {task.name: task.frozen["n"] for task in found} == {"piqa": 6, "wikitext": 2}


@pytest.fixture
def tagged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tag and a group over rows of the pack, beside the stock tasks."""
    for name in ("red", "blue", "inner"):
        tag = "tag: colours\n" if name != "inner" else ""
        (tmp_path / f"{name}.yaml").write_text(f"include: {pack.FOLDER / 'piqa.yaml'}\ntask: {name}\n{tag}")
    scored = "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    (tmp_path / "outer.yaml").write_text(f"group: outer\ntask: [inner]\n{scored}")
    (tmp_path / "loose.yaml").write_text("group: loose\ntask: [outer, red]\n")
    original = TaskManager.__init__

    def init(self, include_path=None, include_defaults=True):
        original(self, include_path=[str(tmp_path), *(include_path or [])], include_defaults=False)

    monkeypatch.setattr(TaskManager, "__init__", init)


@pytest.mark.usefixtures("tagged")
def test_a_group_without_a_score_is_its_parts():
    found = prepare(Evaluate(tasks=["loose"], limit=6, limits={"loose": 2, "red": 3}), seed=0)
    assert {task.name: task.frozen["n"] for task in found} == {"outer": 2, "red": 3}


@pytest.mark.usefixtures("tagged")
@pytest.mark.parametrize("folder", ["outer", "inner"])
def test_local_rows_that_a_group_would_not_read_are_refused(folder: str, tmp_path: Path):
    sets = tmp_path / "sets"
    (sets / folder).mkdir(parents=True)
    (sets / folder / "validation.jsonl").write_text(json.dumps(pack.read("piqa")[0]))
    with pytest.raises(UsageError, match=f"local rows of {folder} are not read for the group 'outer'"), quiet():
        prepare(Evaluate(tasks=["outer"], task_data=str(sets)), seed=0)
    (sets / folder).rename(sets / "red")
    spec = Evaluate(tasks=["colours", "outer"], limit=1, task_data=str(sets))
    assert [task.frozen["source"] for task in prepare(spec, seed=0)] == ["lm-eval", "local files", "lm-eval"]


@pytest.mark.usefixtures("tagged")
def test_the_limit_of_a_tag_is_that_of_its_tasks(capsys: pytest.CaptureFixture[str]):
    spec = Evaluate(tasks=["colours", "piqa", "outer"], limit=6, limits={"colours": 3, "red": 2, "outer": 4})
    assert {task.name: task.frozen["n"] for task in prepare(spec, seed=0)} == {
        "blue": 3, "red": 2, "piqa": 6, "outer": 4,
    }  # fmt: skip
    check_tasks(spec)
    assert "eval.limits" not in capsys.readouterr().err
    check_tasks(spec.model_copy(update={"limits": {"inner": 2, "green": 1}}))  # a group has one limit
    assert "not evaluated by themselves: green, inner" in capsys.readouterr().err
    check_tasks(spec.model_copy(update={"tasks": [], "perplexity": [TextFile(name="own", path="own.txt")]}))
    assert "eval.limits" not in capsys.readouterr().err


def test_few_shot_examples_depend_on_the_seed_only():
    spec = Evaluate(tasks=["arc_easy"], limit=2, num_fewshot=2)
    with quiet():
        a, b, c = (prepare(spec, seed)[0].frozen for seed in (1, 1, 2))
    assert a == b
    assert a["prompts"] != c["prompts"]
    assert a["num_fewshot"] == [2]


@pytest.mark.parametrize(
    ("name", "splits"),
    [("arc_easy", ""), ("openbookqa", ""), ("hellaswag", ""), ("named", "fewshot_split: validation\n")],
)
def test_no_document_is_an_example_of_itself(name: str, splits: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """lm-eval takes examples from the rows that are evaluated where there are no others, or where a task says so."""
    (tmp_path / "named.yaml").write_text(f"include: {pack.FOLDER / 'piqa.yaml'}\ntask: named\n{splits}")
    original = TaskManager.__init__

    def init(self, include_path=None, include_defaults=True):
        original(self, include_path=[str(tmp_path), *(include_path or [])], include_defaults=False)

    monkeypatch.setattr(TaskManager, "__init__", init)
    with quiet():
        task = prepare(Evaluate(tasks=[name], num_fewshot=5), seed=0)[0].tasks["tasks"][name]
    asked = {instance.doc_id: (task.doc_to_text(instance.doc), instance.args[0]) for instance in task.instances}
    assert len(asked) == 250
    assert not [document for document, (question, prompt) in asked.items() if prompt.count(question) != 1]


@pytest.fixture
def small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock tasks reduced to one folder: indexing all of lm-eval takes several seconds."""
    original = TaskManager.__init__

    def init(self, include_path=None, include_defaults=True):
        stock = str(Path(lm_eval.tasks.__file__).parent / "arc")
        paths = [stock] * include_defaults + list(include_path or [])
        original(self, include_path=paths, include_defaults=False)

    monkeypatch.setattr(TaskManager, "__init__", init)


@pytest.mark.usefixtures("small_index")
def test_unknown_task_is_refused_with_a_suggestion_and_the_list():
    with pytest.raises(UsageError) as caught, quiet():
        prepare(Evaluate(tasks=["piqa", "helaswag"]), seed=0)
    assert "helaswag" in caught.value.what
    assert "Did you mean 'hellaswag'?" in caught.value.what
    assert all(name in caught.value.fix for name in STOCK)


@pytest.mark.usefixtures("small_index")
def test_stock_task_without_network_is_refused_and_names_the_pack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError) as caught, quiet():
        prepare(Evaluate(tasks=["arc_challenge"]), seed=0)
    assert "arc_challenge" in caught.value.what
    assert "offline" in caught.value.what
    assert "HF_HUB_OFFLINE" in caught.value.why
    assert "offline pack" in caught.value.fix


@pytest.mark.usefixtures("small_index")
def test_turning_the_pack_off_means_the_hub():
    with pytest.raises(InputError, match="arc_easy"), quiet():
        prepare(Evaluate(tasks=["arc_easy"], offline_pack=False), seed=0)


def test_neither_tasks_nor_texts_is_refused():
    with pytest.raises(UsageError, match="No tasks to evaluate, and no texts") as caught:
        prepare(Evaluate(tasks=[]), seed=0)
    assert "eval.tasks" in caught.value.why and "eval.perplexity" in caught.value.why
    assert prepare(Evaluate(tasks=[], perplexity=[TextFile(name="mine", path="mine.txt")]), seed=0) == []


def test_quiet_restores_loggers(capsys: pytest.CaptureFixture[str]):
    logger = logging.getLogger("lm_eval")
    logger.setLevel(logging.INFO)
    with quiet():
        assert logger.level == logging.ERROR
    assert logger.level == logging.INFO
