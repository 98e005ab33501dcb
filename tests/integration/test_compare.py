"""benchmarks/compare: many runs by one command. Its arms are tiny, its processes and its page are real."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cla_convert.errors import UsageError
from tests.unit.run_files import write_domains, write_run

ROOT = Path(__file__).parents[2]
COMPARE = ROOT / "benchmarks" / "compare"
sys.path.insert(0, str(COMPARE))

from arms import read_comparison  # noqa: E402
from work import Place  # noqa: E402


@pytest.fixture
def listed(tiny_llama: Path, tmp_path: Path) -> list[str]:
    """The command line of a comparison: a conversion, what it is trained to, and one that cannot be converted."""
    words = ["the cat sat", "dogs ran over hills", "ships sail to see", "on mats of green"]
    rows = [{"text": " ".join(words[(i * j) % 4] for j in range(1, 40))} for i in range(1, 40)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arms = {
        "models": {"tiny": {"recipe": "default", "settings": {"source.model": str(tiny_llama)}}},
        "arms": {
            "broken": {"model": "tiny", "settings": {"convert.sharing": "cla9"}},
            "broken-trained": {"from": "broken", "budget": "short"},
            "pairs": {"model": "tiny", "alone": True, "settings": {"convert.sharing": "cla2", "convert.init": "first"}},
            "pairs-trained": {"from": "pairs", "budget": "short"},
        },
        "tables": [
            {"title": "All", "arms": ["pairs", "pairs-trained", "broken-trained"]},
            {"title": "None", "arms": ["broken"]},
        ],
    }
    size = {
        "settings": {
            "data.sources": [{"path": str(tmp_path / "text.jsonl")}], "data.held_out": 0.2, "convert.init": "mean",
            "train.sequence_length": 32, "train.batch_tokens": 64, "train.validation_tokens": 64,
            "train.checkpoint_every": 64, "device": "cpu", "eval.tasks": ["openbookqa"], "eval.limit": 1,
            "eval.prompts": [], "eval.domain_tokens": 32, "eval.agreement_tokens": 64,
        },
        "budgets": {"short": {"train.tokens": 256}},
    }  # fmt: skip
    for name, content in (("arms", arms), ("size", size)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    files = ["--arms", str(tmp_path / "arms.yaml"), "--size", str(tmp_path / "size.yaml")]
    return [sys.executable, str(COMPARE), *files, "--out", str(tmp_path / "out")]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def compare(line: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*line, *more], env=environment(), capture_output=True, text=True)


def test_one_command_makes_all_that_is_not_there(listed: list[str], tmp_path: Path):
    out = tmp_path / "out"
    early = compare(listed, "--minutes", "0")
    assert early.returncode == 130 and not (out / "arms").exists()  # no time: nothing begins
    first = compare(listed, "--jobs", "2")
    assert first.returncode == 1, first.stderr
    assert "broken-trained: not run: broken failed" in first.stderr
    assert first.stderr.index("failed broken") < first.stderr.index("begin  pairs")  # which runs alone
    assert "cla9" in (out / "logs" / "broken.log").read_text()
    (row, *rows) = json.loads((out / "results.json").read_text())["All"]
    assert [one["label"] for one in rows] == ["pairs", "pairs-trained"] and row["point"] == "before"
    assert [one["tokens"] for one in rows] == [None, 256] and rows[0]["kl"] > 0 and rows[0]["kl"] != rows[1]["kl"]
    page = (out / "results.md").read_text()
    assert "broken-trained (not run: broken failed)" in page and "--set train.tokens=256" in page
    assert [one["kv_bytes_per_token"] for one in (row, *rows)] == [384, 192, 192]  # of 16 bits; they are of 32 here
    assert "domains-1.png" in page and (out / "domains-1.png").read_bytes().startswith(b"\x89PNG")

    # One conversion, shared: the same files, and the trained arm did not touch them.
    weights = [out / "arms" / name / "converted" / "model.safetensors" for name in ("pairs", "pairs-trained")]
    assert weights[0].samefile(weights[1])
    made = {file: file.stat().st_mtime_ns for file in (out / "arms").rglob("*") if "broken" not in str(file)}
    again = compare(listed)
    assert "begin  pairs" not in again.stderr and "begin  broken" in again.stderr  # what failed is tried again
    assert made == {file: file.stat().st_mtime_ns for file in made}

    # The page needs no weights; and an arm is not continued under other settings.
    for folder in out.rglob("uptrained"):
        shutil.rmtree(folder)
    assert compare(listed, "--page").returncode == 0 and (out / "results.md").read_text().count("pairs-trained") > 1
    other = compare(listed, "--set", "train.clip=0.5")
    assert other.returncode == 2 and "train.clip: None then, 0.5 now" in other.stderr


def test_what_is_interrupted_goes_on(listed: list[str], tmp_path: Path):
    out, more = tmp_path / "out", ["--only", "pairs*", "--set", "eval.domain_tokens=0"]
    size = yaml.safe_load((tmp_path / "size.yaml").read_text())
    size["budgets"]["short"] |= {"train.tokens": 64 * 200, "train.validate_every": 64 * 200}
    (tmp_path / "size.yaml").write_text(yaml.safe_dump(size))
    metrics = out / "arms" / "pairs-trained" / "metrics.jsonl"
    process = subprocess.Popen([*listed, *more], env=environment(), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130 and "pairs-trained: interrupted" in said, said
    record = json.loads((out / "records" / "pairs-trained.json").read_text())
    steps = metrics.read_text().count('"loss"')
    assert record["ended"] == "interrupted" and 3 <= steps < 200
    last = compare(listed, *more)
    assert last.returncode == 0 and "begin  pairs\n" not in last.stderr, last.stderr
    assert "resum" in (out / "logs" / "pairs-trained.log").read_text()
    assert metrics.read_text().count('"loss"') == 200


@pytest.mark.parametrize("size", ["h100", "dry"])
def test_the_list_is_of_recipes_that_there_are(size: str):
    found = read_comparison(COMPARE / "arms.yaml", COMPARE / f"{size}.yaml", models={}, assignments=[], only=[])
    named = {name for table in found.tables for name in table.arms}
    trained = {name for name, arm in found.arms.items() if not arm.converts_only}
    assert trained <= named, "every arm that is trained stands in a table"
    cache = read_comparison(
        COMPARE / "arms.yaml", COMPARE / f"{size}.yaml", models={}, assignments=[], only=["*-cache"]
    )
    assert [*cache.arms] == ["smollm2-calibrated", "smollm2-calibrated-trained", "smollm2-fp8-cache"]
    parents = [arm.parent for arm in found.arms.values() if arm.parent]
    assert all([*found.arms].index(parent) < [*found.arms].index(name)
               for name, arm in found.arms.items() if (parent := arm.parent)) and parents  # fmt: skip


def test_settings_are_those_of_the_arm_last(listed: list[str], tmp_path: Path):
    def read(**changed: Any) -> dict[str, Any]:
        options = {"models": {}, "assignments": [], "only": []} | changed
        return dict(read_comparison(tmp_path / "arms.yaml", tmp_path / "size.yaml", **options).arms)

    found = read(models={"tiny": "elsewhere"}, assignments=["train.clip=0.5"], only=["*pairs-trained"])
    assert list(found) == ["pairs", "pairs-trained"]  # the one that it starts from comes along
    settings = found["pairs-trained"].settings
    assert settings["source.model"] == "elsewhere" and settings["train.clip"] == 0.5
    assert [settings[f"convert.{name}"] for name in ("sharing", "init")] == ["cla2", "first"]  # as in its conversion
    assert settings["train.tokens"] == 256
    with pytest.raises(UsageError, match="there is no 'tinny'"):
        read(models={"tinny": "elsewhere"})
    with pytest.raises(UsageError, match="train.clip"):
        read(assignments=["train.clip=x"])
    arms = yaml.safe_load((tmp_path / "arms.yaml").read_text())
    wrong = {
        "trained already": {"from": "pairs-trained"}, "Did you mean 'pairs'": {"from": "piars"},
        "there is no 'none'": {"from": "pairs", "budget": "none"}, "'form'": {"form": "pairs"},
    }  # fmt: skip
    for words, entry in wrong.items():
        changed = arms | {"arms": arms["arms"] | {"new": entry}}
        (tmp_path / "arms.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
        with pytest.raises(UsageError, match=words):
            read()


def test_a_page_says_by_how_many_tokens_a_run_is_ahead(
    tmp_path: Path, listed: list[str], monkeypatch: pytest.MonkeyPatch
):
    import page as module
    from page import write_page

    drawn, draw = list[set[str]](), module.draw_domains
    monkeypatch.setattr(module, "draw_domains", lambda runs: drawn.extend(map(set, runs.values())) or draw(runs))
    place = Place(tmp_path / "out")
    found = read_comparison(
        tmp_path / "arms.yaml", tmp_path / "size.yaml", models={}, assignments=[], only=["pairs*", "broken*"]
    )
    for name, curve in (("pairs", [90, 50, 40]), ("pairs-trained", [45, 40, 30])):
        folder = write_run(place.run(name))
        write_domains(folder)
        rows = [{"tokens": 2048 * i, "validation_perplexity": value} for i, value in enumerate(curve)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        environment = json.loads((folder / "environment.json").read_text())
        environment["versions"] |= {"cla-convert": "1", "transformers": "5"}
        (folder / "environment.json").write_text(json.dumps(environment | {"started": "2026-01-02T03:04"}))
        (folder / "eval" / "before" / "held_out.json").write_text('{"perplexity": 30.0, "identity": "a"}')
        (folder / "eval" / "after" / "agreement").mkdir()
        (folder / "eval" / "after" / "agreement" / "mine.json").write_text('{"kl": 9.0, "top1": 0.1, "tokens": 9}')
    states = {name: "done" if "broken" not in name else "not run yet" for name in found.arms}
    page = write_page(found, place, states).read_text()
    assert "pairs-trained has the held-out perplexity at which pairs ends after 2.05k tokens" in page, page
    assert "pairs has the held-out perplexity at which pairs-trained" not in page
    assert drawn and all(names == {"law", "code", "news"} for names in drawn)  # not every run has texts of one's own
