"""Full sets from local files: the rows of the user, the prompts, targets and metrics of the task."""

import json
from pathlib import Path

import lm_eval.tasks
import pyarrow
import pyarrow.parquet
import pytest
from lm_eval.tasks import TaskManager
from lm_eval.utils import hash_string

from cla_convert.errors import InputError
from cla_convert.evaluation.local_rows import local_splits
from cla_convert.evaluation.prepare import Prepared, prepare
from cla_convert.evaluation.quiet import quiet
from cla_convert.evaluation.tasks import pack
from cla_convert.recipe import Evaluate

SCIQ = {"question": "Which gas do plants take up?", "correct_answer": "carbon dioxide", "support": " Leaves breathe.",
        "distractor1": "helium", "distractor2": "argon", "distractor3": "neon"}  # fmt: skip


@pytest.fixture(autouse=True)
def small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock tasks reduced to a few folders: indexing all of lm-eval takes many seconds."""
    original = TaskManager.__init__
    stock = [str(Path(lm_eval.tasks.__file__).parent / name) for name in ("piqa", "sciq", "super_glue/boolq", "arc")]

    def init(self, include_path=None, include_defaults=True):
        original(self, include_path=stock * include_defaults + list(include_path or []), include_defaults=False)

    monkeypatch.setattr(TaskManager, "__init__", init)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped rows as a user would store full sets: jsonl, parquet in two parts, boolq as Google publishes it."""
    root = tmp_path_factory.mktemp("sets")
    for name in ("piqa", "arc_easy", "boolq", "sciq"):
        (root / name).mkdir()
    write(root / "piqa" / "validation.jsonl", pack.read("piqa"))
    for part, rows in enumerate((pack.read("arc_easy")[:100], pack.read("arc_easy")[100:])):
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, root / "arc_easy" / f"test-0000{part}-of-00002.parquet")
    google = [
        {"question": r["question"], "passage": r["passage"], "answer": bool(r["label"])} for r in pack.read("boolq")
    ]
    write(root / "boolq" / "validation.jsonl", google)
    write(root / "sciq" / "validation_part.jsonl", [SCIQ])
    (root / "sciq" / "test_notes.txt").write_text("not rows")
    return root


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepared(names: list[str], **settings) -> dict[str, Prepared]:
    with quiet():
        return {task.name: task for task in prepare(Evaluate(tasks=names, **settings), seed=0)}


def hashes(prepared: Prepared) -> set[tuple]:
    """Hashes of prompt, choices and target of every document."""
    task = prepared.tasks["tasks"][prepared.name]
    found: dict[int, list] = {}
    for instance in task.instances:
        target = hash_string(str(task.doc_to_target(instance.doc)))
        found.setdefault(instance.doc_id, [target]).append(tuple(hash_string(text) for text in instance.args))
    return {tuple(entry) for entry in found.values()}


@pytest.mark.parametrize("offline_pack", [True, False])
def test_prompts_and_targets_equal_those_of_the_pack_and_of_the_stock_task(folder: Path, offline_pack: bool):
    names = ["piqa", "arc_easy", "boolq"]
    shipped = prepared(names)
    local = prepared(names, task_data=str(folder), offline_pack=offline_pack)  # False: the stock YAMLs of lm-eval
    for name in names:
        assert local[name].frozen["source"] == "local files"
        assert len(hashes(shipped[name])) == 250
        assert hashes(local[name]) == hashes(shipped[name])
        ours, stock = (side[name].tasks["tasks"][name] for side in (shipped, local))
        assert ours.aggregation() == stock.aggregation()


def test_a_task_that_is_not_shipped_and_a_split_that_is_not_there(folder: Path):
    (task,) = prepared(["sciq"], task_data=str(folder)).values()
    assert (task.frozen["source"], task.frozen["split"], task.frozen["n"]) == ("local files", ["validation"], 1)
    instance = task.tasks["tasks"]["sciq"].instances[3]
    assert instance.args == ("Leaves breathe.\nQuestion: Which gas do plants take up?\nAnswer:", " carbon dioxide")


def test_a_task_without_a_folder_is_as_ever(folder: Path):
    (task,) = prepared(["openbookqa"], task_data=str(folder), limit=3).values()
    assert task.frozen["source"] == "offline pack"


def test_tasks_are_built_once_until_their_files_change(tmp_path: Path):
    (tmp_path / "piqa").mkdir()
    write(tmp_path / "piqa" / "validation.jsonl", pack.read("piqa")[:3])
    first, again = (prepared(["piqa", "boolq"], task_data=str(tmp_path), limit=9) for _ in range(2))
    assert all(first[name] is again[name] for name in first)
    assert prepared(["piqa"], task_data=str(tmp_path), limit=2)["piqa"].frozen["n"] == 2
    write(tmp_path / "piqa" / "validation.jsonl", pack.read("piqa")[:4])
    changed = prepared(["piqa", "boolq"], task_data=str(tmp_path), limit=9)
    assert changed["piqa"].frozen["n"] == 4 and changed["boolq"] is first["boolq"]


def test_rows_come_in_a_fixed_random_order(folder: Path):
    first, again = (local_splits(folder / "piqa")["validation"] for _ in range(2))
    assert first == again != pack.read("piqa")
    assert sorted(row["goal"] for row in first) == sorted(row["goal"] for row in pack.read("piqa"))


def test_what_is_wrong_is_said(tmp_path: Path, folder: Path):
    with pytest.raises(InputError, match="There is no folder"):
        prepared(["piqa"], task_data=str(tmp_path / "nowhere"))
    (tmp_path / "piqa").mkdir()
    with pytest.raises(InputError, match=r"holds no rows(.|\n)*piqa/test.jsonl"):
        prepared(["piqa"], task_data=str(tmp_path))
    write(tmp_path / "piqa" / "train.jsonl", pack.read("piqa")[:1])
    with pytest.raises(InputError, match="hold train, not validation"):
        prepared(["piqa"], task_data=str(tmp_path))
    write(tmp_path / "piqa" / "validation.jsonl", [{"question": "fly?", "sol1": "a", "sol2": "b", "label": 0}])
    with pytest.raises(InputError, match=r"do not suit it(.|\n)*goal"):
        prepared(["piqa"], task_data=str(tmp_path))
    write(tmp_path / "piqa" / "validation.jsonl", [{"goal": "fly", "sol1": "a", "sol2": "b", "answer": 0}])
    with pytest.raises(InputError, match="have no column label"):
        prepared(["piqa"], task_data=str(tmp_path))
    (tmp_path / "piqa" / "validation.jsonl").write_text("{}\nno json\n")
    with pytest.raises(InputError, match=r"validation.jsonl cannot be read(.|\n)*line 2, column 1"):
        prepared(["piqa"], task_data=str(tmp_path))


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path):
    """Editors of other systems put one there; training text may have it, too."""
    (tmp_path / "test.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert sorted(row["a"] for row in local_splits(tmp_path)["test"]) == [1, 2]
