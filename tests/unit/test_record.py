"""Under what each stage of a run was made, in environment.json and in the report."""

import json
from pathlib import Path

import pytest

from cla_convert import record
from cla_convert.files import write_json
from cla_convert.recipe import Recipe
from cla_convert.record import recorded
from cla_convert.report.report import build_report
from cla_convert.run_folder import RunFolder
from tests.unit.run_files import write_run

RECIPE = Recipe.model_validate({"device": "cpu"})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.save_recipe(RECIPE)
    return run


def make(folder: RunFolder, stage: str, path: Path) -> None:
    """A stage that leaves a file."""
    with recorded(RECIPE, folder, stage):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def circumstances(monkeypatch: pytest.MonkeyPatch, command: str, torch: str, cores: int = 2) -> None:
    monkeypatch.setattr(record, "command_line", lambda: command)
    monkeypatch.setattr(record, "versions", lambda: {"python": "3.11", "torch": torch})
    monkeypatch.setattr(record, "hardware", lambda: {"cores": cores})


def test_a_stage_keeps_what_it_was_made_under(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    circumstances(monkeypatch, "first", "2.13")
    make(folder, "convert", folder.convert.path)
    make(folder, "uptrain", folder.training.metrics)  # and is interrupted
    circumstances(monkeypatch, "second", "2.14")
    folder.training.metrics.unlink()
    make(folder, "uptrain", folder.training.metrics)
    with recorded(RECIPE, folder, "convert"):  # finds it done
        pass
    make(folder, "eval", folder.evaluation.point("before").measured("held_out"))
    kept = json.loads(folder.environment.path.read_text())
    assert [(one["command"], one["versions"]["torch"], [*one["stages"]]) for one in kept["invocations"]] == [
        ("first", "2.13", ["convert", "uptrain"]),
        ("second", "2.14", ["uptrain", "eval"]),
    ]
    assert [*kept["stages"]] == ["convert", "uptrain", "eval"]
    assert (kept["command"], kept["versions"]["torch"]) == ("second", "2.14")


def test_what_is_resumed_under_the_same_circumstances_is_one_invocation(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    circumstances(monkeypatch, "line", "2.13")
    for path in (folder.training.metrics, folder.training.result.path):
        with pytest.raises(KeyboardInterrupt), recorded(RECIPE, folder, "uptrain"):
            path.write_text("{}")
            raise KeyboardInterrupt
    (one,) = json.loads(folder.environment.path.read_text())["invocations"]
    assert [*one["stages"]] == ["uptrain"]


def test_what_an_older_version_recorded_stays(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {
        "command": "old",
        "versions": {"torch": "2.6"},
        "started": "2026-01-01",
        "stages": {"convert": 9.0},
        "kwh": 2,
    }
    write_json(folder.environment.path, old)
    circumstances(monkeypatch, "new", "2.13")
    make(folder, "eval", folder.evaluation.point("before").measured("held_out"))
    kept = json.loads(folder.environment.path.read_text())
    assert [one["command"] for one in kept["invocations"]] == ["old", "new"]
    assert kept["started"] == kept["invocations"][0]["began"] == "2026-01-01" and kept["stages"]["convert"] == 9.0
    assert kept["kwh"] == 2


def invocation(**differs: object) -> dict[str, object]:
    same = {"began": "2026-11-01T10:00:00+00:00", "command": "cla-convert run mine.yaml --out run", "device": "cpu",
            "versions": {"python": "3.11.2", "torch": "2.13.0"}, "hardware": {"cpu": "X", "cores": 2}}  # fmt: skip
    return same | differs


def told(run: Path, *invocations: dict[str, object]) -> tuple[str, str]:
    write_json(run / "environment.json", {"command": "last", "invocations": list(invocations), "stages": {"eval": 2.0}})
    build_report(run)
    return (run / "report.md").read_text(), (run / "report.html").read_text()


def test_the_report_tells_stages_of_other_circumstances_apart(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    first = invocation(stages={"convert": 61.0, "uptrain": 5.0})
    other = invocation(
        stages={"uptrain": 7.0, "eval": 2.0}, command="cla-convert run mine.yaml --out run --gate", device="cuda",
        versions={"python": "3.11.2", "torch": "2.14.0"}, hardware={"cpu": "Y", "cores": 8, "gpus": ["H100"]},
    )  # fmt: skip
    for page in told(run, first, other):
        for words in ("not made in one go", "convert 1 min 1 s, uptrain 5 s", "uptrain 7 s, eval 2 s", "--gate"):
            assert words in page
        assert "torch 2.13.0 / 2.14.0" in page and "python 3.11.2 /" not in page
        assert "convert, uptrain: cpu X, cores 2; uptrain, eval: cpu Y, cores 8, gpus H100" in page
        assert "not all made with the same torch, machine or device" in page
    once, _ = told(run, invocation(stages={"convert": 61.0, "eval": 2.0}))
    assert "not made in one go" not in once and "not all made with" not in once and "cpu X, cores 2" in once


def test_the_report_tells_what_training_was_resumed_with(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    train = json.loads((run / "train.json").read_text())
    changed = [{"name": "torch", "before": "2.13.0", "after": "2.14.0"}, {"name": "processes", "before": 2, "after": 1}]
    write_json(run / "train.json", train | {"resumed": [{"step": 120, "changed": changed}]})
    build_report(run)
    for page in ("report.md", "report.html"):
        said = (run / page).read_text()
        assert "Resumed after step 120 with torch 2.14.0 (before: 2.13.0), processes 1 (before: 2)" in said
