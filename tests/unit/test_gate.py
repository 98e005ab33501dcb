"""From the files of a run folder to the verdict, and from the verdict to the exit code."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from cla_convert.errors import ExitCode, QualityGate
from cla_convert.evaluation.comparison import compare_run, write_comparison
from cla_convert.evaluation.gate import enforce
from cla_convert.evaluation.statistics import mcnemar
from cla_convert.evaluation.verdict import Margins
from cla_convert.files import write_json
from cla_convert.report.report import build_report
from cla_convert.run_folder import RunFolder
from tests.launch import cla


def point(run: Path, name: str, scores: dict[str, list[float]], specification: str = "same") -> None:
    """The result files of one point, as the harness writes them."""
    for task, values in scores.items():
        metric = "acc" if set(values) <= {0.0, 1.0} else "loglikelihood"
        identity = {"task": task, "doc_hash": "d", "prompt_hash": "p", "target_hash": "t"}
        samples = [identity | {"doc_id": i, "metrics": {metric: value}} for i, value in enumerate(values)]
        write_json(run / "eval" / name / "tasks" / f"{task}.json", {"task": task, "samples": samples})
    results = {"tasks": {task: {} for task in scores}, "specification_hash": specification}
    write_json(run / "eval" / name / "results.json", results)


def right(n: int, share: float) -> list[float]:
    return [1.0] * round(n * share) + [0.0] * (n - round(n * share))


def gate(run: Path, **margins: float) -> dict:
    return compare_run(RunFolder(run), margins=Margins(**margins), seed=0)


def test_no_loss_on_many_rows_passes_both_gates(tmp_path: Path):
    scores = {"piqa": right(3000, 0.7), "boolq": right(3000, 0.6)}
    point(tmp_path, "before", scores)
    point(tmp_path, "converted", scores)
    found = gate(tmp_path)
    assert (found["compared"], found["status"]) == ("converted", "within_margin")
    assert found["gate"] == {"state": "passed", "passed": True, "reasons": []}
    enforce(found, "strict")


def test_few_rows_are_inconclusive_and_fail_the_strict_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("before", "converted", "after"):
        point(tmp_path, name, {"piqa": right(20, 0.7)})
    found = gate(tmp_path)
    assert (found["compared"], found["status"]) == ("after", "inconclusive")
    assert (found["gate"]["state"], found["gate"]["passed"]) == ("inconclusive", False)
    enforce(found, False)
    assert capsys.readouterr().err == ""
    enforce(found, True)
    assert "the quality gate is inconclusive: the mean accuracy" in capsys.readouterr().err
    with pytest.raises(QualityGate, match=r"strict(.|\n)*the mean accuracy over tasks is not shown to be within"):
        enforce(found, "strict")


def test_a_shown_loss_fails(tmp_path: Path):
    point(tmp_path, "before", {"piqa": right(1000, 0.7), "boolq": right(1000, 0.6)})
    point(tmp_path, "after", {"piqa": right(1000, 0.6), "boolq": right(1000, 0.5)})
    found = gate(tmp_path)
    assert found["status"] == "margin_broken"
    with pytest.raises(
        QualityGate, match="mean accuracy over tasks is worse than the margin of 1.0 points: -10.0"
    ) as caught:
        enforce(found, True)
    assert caught.value.exit_code == ExitCode.GATE == 4
    assert gate(tmp_path, accuracy=0.2)["gate"]["passed"]  # the same loss within a wider margin


def test_one_collapsed_task_cannot_hide_behind_the_mean(tmp_path: Path):
    before = {f"task{i}": right(1000, 0.5) for i in range(6)}
    after = before | {"task0": right(1000, 0.40)} | {f"task{i}": right(1000, 0.53) for i in range(1, 6)}
    point(tmp_path, "before", before)
    point(tmp_path, "after", after)
    found = gate(tmp_path)
    assert found["status"] == "margin_broken" and found["mean_accuracy"]["verdict"] == "within_margin"
    assert [(r["scope"], r["code"]) for r in found["gate"]["reasons"]] == [("task0", "margin_broken")]
    assert not found["gate"]["passed"]
    row = found["tasks"]["task0"]["acc"]
    assert row["p_value"] == mcnemar(row["lost"], row["gained"])
    assert row["p_inferior_holm"] == pytest.approx(6 * row["p_inferior"])
    assert row["p_holm"] == pytest.approx(6 * row["p_value"])


def test_retrieval_is_judged_by_itself_and_does_not_move_the_mean(tmp_path: Path):
    point(tmp_path, "before", {"piqa": right(2000, 0.5), "passkey": right(400, 1.0)})
    point(tmp_path, "after", {"piqa": right(2000, 0.5), "passkey": right(400, 0.2)})
    found = gate(tmp_path)
    assert found["mean_accuracy"]["tasks"] == ["piqa"]
    assert [reason["scope"] for reason in found["gate"]["reasons"]] == ["passkey"]


@pytest.mark.parametrize("absent", ["everything", "a task", "accuracies", "likeness"])
def test_absent_numbers_do_not_open_the_gate(tmp_path: Path, absent: str):
    scores = {"piqa": right(3000, 0.7), "boolq": right(3000, 0.6)}
    if absent == "accuracies":
        scores = {"passkey": list(np.linspace(-3, -1, 50))}
    point(tmp_path, "before", scores)
    if absent != "everything":
        point(tmp_path, "after", scores, "another" if absent == "likeness" else "same")
    if absent == "a task":
        (tmp_path / "eval" / "after" / "tasks" / "boolq.json").unlink()
    found = gate(tmp_path)
    assert not found["gate"]["passed"]
    with pytest.raises(QualityGate):
        enforce(found, True)


def windows(run: Path, name: str, file: str, nats: list[float], **more: object) -> None:
    write_json(run / "eval" / name / file, {"windows": [[64 * value, 64] for value in nats], **more})


@pytest.mark.parametrize(
    ("rise", "spread", "expected"),
    [(0.0, 0.0, "within_margin"), (0.03, 0.001, "within_margin"), (0.36, 0.01, "margin_broken"),
     (0.05, 0.1, "inconclusive")],
)  # fmt: skip
def test_perplexity_has_a_say_whatever_the_accuracy(tmp_path: Path, rise: float, spread: float, expected: str):
    for name, worse in (("before", 0.0), ("after", rise)):
        point(tmp_path, name, {"piqa": right(3000, 0.7)})
        windows(
            tmp_path, name, "held_out.json", [3 + i / 9 + bool(worse) * (worse + spread * (-1) ** i) for i in range(16)]
        )
    found = gate(tmp_path)
    assert (found["status"], found["mean_accuracy"]["verdict"]) == (expected, "within_margin")
    row = next(row for row in found["judged"] if row["scope"] == "held_out")
    assert row["delta"] == pytest.approx(np.expm1(rise)) and row["verdict"] == expected
    assert row["ci95"][0] <= row["delta"] + 1e-12 and row["delta"] - 1e-12 <= row["ci95"][1]
    assert found["gate"]["passed"] is (expected == "within_margin")
    if expected == "margin_broken":
        with pytest.raises(QualityGate, match=r"held_out: perplexity is worse than the margin of 5.0%: \+43.3%"):
            enforce(found, True)
        assert gate(tmp_path, perplexity=0.5)["status"] == "within_margin"  # a wider margin, set by the user


def test_one_text_that_got_worse_is_enough(tmp_path: Path):
    for name, worse in (("before", 0.0), ("after", 0.2)):
        point(tmp_path, name, {"piqa": right(3000, 0.7)})
        windows(tmp_path, name, "held_out.json", [3.0] * 8)
        windows(tmp_path, name, "perplexity/law.json", [3 + worse] * 8)
    found = gate(tmp_path)
    assert {row["scope"]: row["verdict"] for row in found["judged"]} == {
        "mean": "within_margin", "held_out": "within_margin", "law": "margin_broken",
    }  # fmt: skip
    assert found["status"] == "margin_broken" and found["gate"]["state"] == "failed"


@pytest.mark.parametrize(
    ("interval", "expected"),
    [([0.01, 0.03], "within_margin"), ([0.2, 0.3], "margin_broken"), ([0.05, 0.2], "inconclusive"),
     (None, "inconclusive")],
)  # fmt: skip
def test_kl_has_a_say(tmp_path: Path, interval: list[float] | None, expected: str):
    for name in ("before", "after"):
        point(tmp_path, name, {"piqa": right(3000, 0.7)})
    agreement = {"kl": 0.1, "top1": 0.8, "ci95": {"kl": interval, "top1": None}}
    write_json(tmp_path / "eval" / "after" / "agreement.json", agreement)
    found = gate(tmp_path)
    assert (found["status"], found["agreement"]["kl"]) == (expected, 0.1)
    assert gate(tmp_path, kl=0.5)["status"] == ("within_margin" if interval else "inconclusive")


def test_a_text_measured_at_one_point_only_does_not_open_the_gate(tmp_path: Path):
    for name in ("before", "after"):
        point(tmp_path, name, {"piqa": right(3000, 0.7)})
    windows(tmp_path, "before", "held_out.json", [3.0] * 8)
    found = gate(tmp_path)
    assert (found["status"], found["gate"]["state"]) == ("inconclusive", "failed")
    windows(tmp_path, "after", "held_out.json", [3.0] * 8)
    assert gate(tmp_path)["gate"]["passed"]


@pytest.mark.parametrize("count", [1, 8])
def test_a_perplexity_that_left_the_numbers_is_worse(tmp_path: Path, count: int):
    for name, nats in (("before", 3.0), ("after", 900.0)):
        point(tmp_path, name, {"piqa": right(3000, 0.7)})
        windows(tmp_path, name, "held_out.json", [nats] * count)
    with np.errstate(over="ignore", invalid="ignore"):
        found = gate(tmp_path)
    assert found["status"] == "margin_broken"
    with pytest.raises(QualityGate, match="not a finite number"):
        enforce(found, True)


def test_what_json_says_null_of_is_worse(tmp_path: Path):
    for name, nats in (("before", 3.0), ("after", math.nan)):
        point(tmp_path, name, {"piqa": right(3000, 0.7)})
        windows(tmp_path, name, "held_out.json", [nats] * 8)
    assert "null" in (tmp_path / "eval" / "after" / "held_out.json").read_text()
    agreement = {"kl": None, "top1": 0.0, "ci95": {"kl": [0.0, None], "top1": None}}
    write_json(tmp_path / "eval" / "after" / "agreement.json", agreement)
    with np.errstate(all="ignore"):
        found = gate(tmp_path)
    verdicts = {row["measure"]: row["verdict"] for row in found["judged"]}
    assert verdicts["perplexity"] == verdicts["kl"] == "margin_broken"


def shares(run: Path, name: str, metrics: dict[str, list[float]]) -> None:
    """Beside piqa a task of several metrics."""
    point(run, name, {"piqa": right(3000, 0.7)})
    identity = {"task": "squad", "doc_hash": "d", "prompt_hash": "p", "target_hash": "t"}
    count = len(next(iter(metrics.values())))
    samples = [
        identity | {"doc_id": i, "metrics": {metric: values[i] for metric, values in metrics.items()}}
        for i in range(count)
    ]
    write_json(run / "eval" / name / "tasks" / "squad.json", {"task": "squad", "samples": samples})
    results = {"tasks": {"piqa": {}, "squad": {}}, "specification_hash": "same"}
    write_json(run / "eval" / name / "results.json", results)


@pytest.mark.parametrize("exact", [True, False])
def test_a_collapse_shows_whatever_the_metric(tmp_path: Path, exact: bool):
    """f1 comes first, as some tasks give it; with exact_match beside it, or alone."""
    for name, f1, share in (("before", 0.8, 0.75), ("after", 0.05, 0.0)):
        spread = [f1 + 0.001 * (i % 7) for i in range(400)]
        shares(tmp_path, name, {"f1": spread} | ({"exact_match": right(400, share)} if exact else {}))
    found = gate(tmp_path)
    assert found["status"] == "margin_broken" and not found["gate"]["passed"]
    (row,) = [row for row in found["judged"] if row["scope"] == "squad"]
    assert row["metric"] == ("exact_match" if exact else "f1")
    assert found["mean_accuracy"]["tasks"] == (["piqa", "squad"] if exact else ["piqa"])


def test_a_task_without_a_margin_leaves_the_verdict_open(tmp_path: Path):
    for name in ("before", "after"):
        shares(tmp_path, name, {"bleu": [20.0 + i % 5 for i in range(400)]})
    found = gate(tmp_path)
    assert (found["status"], found["gate"]["state"]) == ("inconclusive", "inconclusive")
    with pytest.raises(QualityGate, match="squad: bleu has no margin"):
        enforce(found, "strict")


def test_texts_are_compared_window_by_window(tmp_path: Path):
    for name, worse in (("before", 0.0), ("after", 0.1)):
        point(tmp_path, name, {"piqa": right(10, 0.5)})
        windows = [[(3.0 + worse + i / 100) * 64, 64] for i in range(8)]
        write_json(tmp_path / "eval" / name / "perplexity" / "story.json", {"windows": windows})
    row = gate(tmp_path)["perplexity"]["story"]
    assert (row["n"], row["tokens"], row["lost"], row["gained"]) == (8, 512, 8, 0)
    assert row["after"] / row["before"] == pytest.approx(np.exp(0.1))
    assert row["p_value"] == pytest.approx(2 / 2**8)
    assert row["ci95"][0] < row["delta"] < row["ci95"][1]


def test_the_command_line_exits_with_4_after_writing_everything(tmp_path: Path):
    point(tmp_path, "before", {"piqa": right(1000, 0.7)})
    point(tmp_path, "converted", {"piqa": right(1000, 0.6)})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"eval": {"margin": 0.02}}))
    done = cla("report", str(tmp_path), "--json", "--gate")
    assert done.returncode == 4, done.stderr
    assert "error: The quality gate failed" in done.stderr and "margin of 2.0 points: -10.0" in done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "report.json").read_text())
    assert json.loads(done.stdout)["status"] == "margin_broken"
    assert cla("report", str(tmp_path)).returncode == 0
    early = cla("run", "demo", "--out", str(tmp_path / "run"), "--until", "convert", "--gate")
    assert early.returncode == 2 and "nothing to judge" in early.stderr


def test_a_comparison_of_what_was_measured_before_is_not_believed(tmp_path: Path):
    """An evaluation under other settings was interrupted: its first results lie beside the old comparison."""
    for name in ("before", "after"):
        point(tmp_path, name, {"piqa": right(3000, 0.7)})
        path = tmp_path / "eval" / name / "tasks" / "piqa.json"
        write_json(path, json.loads(path.read_text()) | {"identity": f"{name}, all rows"})
    (tmp_path / "recipe.yaml").write_text("{}")
    assert write_comparison(RunFolder(tmp_path), margins=Margins(), seed=0)["gate"]["passed"]
    assert build_report(tmp_path)["gate"]["passed"]

    whole = path.read_text()
    path.unlink()  # to save room
    assert build_report(tmp_path)["gate"]["passed"]
    path.write_text(whole)

    point(tmp_path, "before", {"piqa": right(100, 0.7)})
    path = tmp_path / "eval" / "before" / "tasks" / "piqa.json"
    write_json(path, json.loads(path.read_text()) | {"identity": "before, 100 rows"})
    report = build_report(tmp_path)
    assert report["gate"]["state"] == "failed" and "100 and 3000 documents" in " ".join(report["caveats"])


def test_a_task_of_nothing_but_a_metric_of_all_documents_leaves_the_verdict_open(tmp_path: Path):
    for name in ("before", "after"):
        shares(tmp_path, name, {"mcc": [[i % 2, (i + 1) % 3 % 2] for i in range(400)]})
    found = gate(tmp_path)
    assert found["tasks"]["squad"]["mcc"]["ci95"] is None
    assert (found["status"], found["gate"]["state"]) == ("inconclusive", "inconclusive")
    with pytest.raises(QualityGate, match="squad: mcc has no margin"):
        enforce(found, "strict")
