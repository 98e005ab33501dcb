"""The report from a run folder of written files: right numbers, nothing invented, safe text, no heavy imports."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cla_convert.errors import InputError
from cla_convert.files import write_json
from cla_convert.report.bench import at_equal_memory, speed_table
from cla_convert.report.formats import groups_text, p_value
from cla_convert.report.model_card import front_matter, write_model_card
from cla_convert.report.report import build_report
from tests.unit.run_files import write_point

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
    assert report["train"]["tokens_per_second"] == 100.0
    assert report["source"]["model"] == "org/tiny"
    assert report["seeds"] == {"seed": 3}
    assert {"converted", "versions", "verdict"} <= report.keys()


def test_verdict_is_honest_about_few_rows_and_names_perplexity(run_dir: Path):
    report = build_report(run_dir)
    assert report["status"] == "not_enough_rows"
    assert report["verdict"].startswith("Not enough rows to tell: after uptraining")
    assert "held_out 30 -> 32 (+6.7%)" in report["verdict"]


def test_a_clear_loss_is_called_that(run_dir: Path):
    for name in ("eval/after", "train.json"):
        path = run_dir / name
        path.rename(run_dir / f"no-{path.name}")
    report = build_report(run_dir)
    assert report["compared"] == "converted"
    assert report["status"] == "margin_broken"
    assert report["verdict"].startswith("Worse than the margin allows: right after conversion")
    assert report["tasks"]["piqa"]["acc"]["delta"] == pytest.approx(-0.3)
    assert report["tasks"]["piqa"]["acc"]["after"] is None
    assert report["kv"]["measured_bytes_after"] == 24576  # of the converted model
    assert any("Nothing was uptrained" in caveat for caveat in report["caveats"])


def test_markdown_holds_the_table_the_pictures_and_the_way_back(run_dir: Path):
    build_report(run_dir)
    text = (run_dir / "report.md").read_text()
    lines = text.splitlines()
    assert lines[2].startswith("**Not enough rows to tell")
    assert any(
        line.startswith("| piqa | acc | 100 | 60.0 | 30.0 | 58.0 | -2.0 [") and line.endswith("| 0.5 |")
        for line in lines
    )
    assert "0 | 1 <- 2 | 3 <- 4 | 5" in text
    assert "cla-convert run recipe.yaml --out run" in text
    assert "memory 8.0 GiB" in text
    for picture in ("loss.png", "sharing.png"):
        assert f"({picture})" in text
        assert (run_dir / picture).read_bytes().startswith(b"\x89PNG")
    # A broken table row shows as another number of columns.
    tables = text.replace("\\|", "").split("\n\n")
    for table in (block for block in tables if block.startswith("|")):
        assert len({row.count("|") for row in table.splitlines()}) == 1, table


def test_caveats_are_said_where_they_apply(run_dir: Path):
    caveats = " ".join(build_report(run_dir)["caveats"])
    for words in ("dequantised", "100 rows a task", "8 shortest of the 62 pages", "4.1k training tokens"):
        assert words in caveats
    assert "cross-entropy" not in caveats
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe["train"]["loss"] = "cross_entropy"
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "cross-entropy" in " ".join(build_report(run_dir)["caveats"])


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
        assert data.model_name == point
        assert found["piqa", "acc"][1] == {"n": 100}
    assert values["converted"]["piqa", "acc"] == 0.3 and values["after"]["piqa", "acc"] == 0.58
    assert values["after"]["held_out", "token_perplexity"] == 32.0
    assert values["after"]["wikitext", "word_perplexity"] == pytest.approx(math.exp(3.2), abs=1e-5)
    assert "uptrained further" in (tmp_path / "converted" / "README.md").read_text()
    assert "Not enough rows" in (tmp_path / "after" / "README.md").read_text()


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
