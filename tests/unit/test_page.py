"""report.html: one file, nothing loaded from elsewhere, no script, every foreign text escaped; rendered in Chromium."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from cla_convert.files import write_json
from cla_convert.report.plots import draw_curves
from cla_convert.report.report import build_report
from cla_convert.report.run_plots import QUALITIES, by_source, draw_pareto, has_pareto, pareto_front
from cla_convert.report.sections import runs
from cla_convert.report.sharing_map import draw_sharing
from tests.unit.run_files import DOMAINS, add_everything, write_domains, write_point, write_run

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
EVIL = "</title><script>alert(1)</script><img src=x onerror='alert(2)'>\" onmouseover=\"alert(3)|$\\frac$"
VOID = {"meta", "br", "img", "hr", "input", "link"}


class Page(HTMLParser):
    """Tags, attributes and visible text; complains about tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self.text += "" if tag in ("code", "span", "strong") else " "

    def handle_data(self, data):
        self.text += data

    def all(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def page(folder: Path) -> Page:
    build_report(folder)
    return Page((folder / "report.html").read_text())


@pytest.fixture
def full(run_dir: Path) -> Path:
    return add_everything(run_dir)


def test_everything_that_was_measured_is_shown(full: Path):
    shown = page(full)
    text = " ".join(shown.text.split())
    for words in (
        "Worse than the margins allow", "CLA cost = after - control: mean accuracy -6.0 points",
        "law perplexity 12.5 -> 16",
        "2.00x smaller", "768 384", "KL to the source", "0.12 [0.1, 0.14]", "81.0 [80.0, 82.0]",
        "Found in a long context", "512 1,024", "damage", "3 \u2190 4 0.04 92.0 81.0",
        "2 right to wrong, 0 wrong to right, of 100", "Question 58?",
        "What it says",
        "Who is there? source Nobody before. converted Nobody converted. uptrained Nobody after. ... control",
        "layers that cache, of 6 6 x 128 bytes 3 x 128 bytes",
        "largest batch of 64 tokens in 953.7 MiB 8 16 2.00x as many", "does not fit",
        "Sharing does not speed up prefill", "Control, the source model: 4.1k tokens", "Energy not measured",
        "cla-convert run recipe.yaml --out run", "specification, before", "margin: 0.01",
        "Recovery by domain, largest KL first", "perplexity converted perplexity after change of perplexity",
        "code no 20 49.19 36.44 +82.2% 0.9 0.6 33.3",
    ):  # fmt: skip
        assert words in text, words
    assert shown.tags.count("svg") == 4  # loss curves and bench, wide and narrow; the sharing map is plain HTML
    assert "layer 3 owns, 4 read; damage 0.04; 92.0% of keys, 81.0% of values kept" in shown.all("title")
    heats = [style for style in shown.all("style") if style.startswith("--damage")]
    assert heats == ["--damage: 0.5", "--damage: 1.0"]


def test_the_right_choice_and_what_the_models_chose_are_marked(full: Path):
    example = build_report(full)["flips"]["piqa"]["examples"]["lost"][0]
    assert example["doc_id"] == 58 and example["prompt"] == "Question 58?"
    yes, no = example["choices"]
    assert (yes["text"], yes["before"], yes["after"]) == ("yes", -1.0, -3.0)
    assert yes["target"] and yes["chosen_before"] and not yes["chosen_after"]
    assert no["chosen_after"] and not no["target"]


def test_the_mean_has_every_column(full: Path):
    at = build_report(full)["mean_accuracy"]["at"]
    assert at == {"before": 0.6, "converted": 0.3, "after": 0.58, "control": 0.64}
    row = next(line for line in (full / "report.md").read_text().splitlines() if line.startswith("| **mean"))
    assert row.startswith("| **mean over 1 task** | acc_norm or acc | 100 | 60.0 | 30.0 | 58.0 | 64.0 | -2.0 [")
    assert "| -6.0 [" in row


def test_perplexities_have_an_interval_against_the_control_too(full: Path):
    report = build_report(full)
    for name, before, after in (("held_out", 25, 32), ("wikitext", math.exp(2.5), math.exp(3.2))):
        cost = report["perplexity"][name]["cla_cost"]
        assert cost["delta"] == pytest.approx(after - before)
        assert cost["ci95"][0] <= cost["delta"] <= cost["ci95"][1] and cost["p_value"] < 0.01
    low, high = report["perplexity"]["held_out"]["cla_cost"]["relative_ci95"]
    text = " ".join(page(full).text.split())
    assert low < 0.28 < high and f"+28.0% [{100 * low:+.1f}%, {100 * high:+.1f}%]" in text
    assert "cla_cost" in report["perplexity"]["law"]  # without windows: no interval, and none is made up
    assert report["perplexity"]["law"]["cla_cost"]["ci95"] is None and "+28.0% [" in (full / "report.md").read_text()


def test_a_bare_run_has_no_empty_sections(run_dir: Path):
    shown = page(run_dir)
    for words in ("CLA cost", "long context", "Agreement", "Memory and speed", "Answers that changed", "other runs"):
        assert (words in shown.text) is (words == "Answers that changed"), words
    assert "None" not in shown.text and "nan" not in shown.text.lower().split()


def test_the_page_loads_nothing_and_runs_nothing(full: Path):
    shown = page(full)
    assert {"script", "link", "iframe", "object", "form"}.isdisjoint(shown.tags)
    assert not [name for _, name, _ in shown.attributes if name.startswith("on")]
    for name in ("src", "href", "xlink:href", "action"):
        assert all(value.startswith("#") for value in shown.all(name)), shown.all(name)
    assert "default-src 'none'; style-src 'unsafe-inline'" in shown.all("content")
    ids = shown.all("id")
    assert len(ids) == len(set(ids))  # several SVGs in one page do not share names


def test_text_from_outside_is_only_ever_text(full: Path, tmp_path: Path):
    convert = json.loads((full / "convert.json").read_text())
    convert["source"] |= {"model": EVIL, "license": EVIL, "sha256": EVIL}
    write_json(full / "convert.json", convert | {"sharing": EVIL, "init": EVIL})
    for point in ("before", "after"):
        path = full / "eval" / point / "tasks" / "piqa.json"
        task = json.loads(path.read_text())
        for sample in task["samples"]:
            sample |= {"prompt": EVIL, "choices": [EVIL, f"{EVIL}2"]}
        write_json(path, task)
    recipe = yaml.safe_load((full / "recipe.yaml").read_text())
    (full / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"note": EVIL}))
    environment = json.loads((full / "environment.json").read_text())
    write_json(full / "environment.json", environment | {"command": EVIL, "hardware": {"cpu": EVIL}})
    other = write_run(tmp_path / "<script>other $\\frac$")
    build_report(full, [other])
    shown = Page((full / "report.html").read_text())
    assert {"script", "img"}.isdisjoint(shown.tags)
    assert not [name for _, name, _ in shown.attributes if name.startswith("on")]
    assert shown.text.count("<script>alert(1)</script>") > 10
    prose = "".join((full / "report.md").read_text().split("```")[::2])  # inside a fence everything is text
    assert "<script>" not in prose and "<img" not in prose


def test_statistics_that_evaluation_left_are_shown(full: Path):
    """eval/comparison.json is believed where it is about the same point: Holm's p, intervals of texts, the gate."""
    row = {
        "kind": "binary", "n": 100, "margin": 0.01, "before": 0.6, "after": 0.58, "delta": -0.02, "ci95": [-0.06, 0.02],
        "lost": 2, "gained": 0, "p_value": 0.5, "p_holm": 0.77, "primary": True, "verdict": "inconclusive",
    }  # fmt: skip
    mean = {"tasks": ["piqa"], "metrics": {"piqa": "acc"}, "verdict": "inconclusive", "margin": 0.01} | {
        key: row[key] for key in ("n", "before", "after", "delta", "ci95")
    }
    text = {"before": 30.0, "after": 32.0, "delta": 2.0, "ci95": [1.1, 2.9], "p_value": 0.01, "n": 4, "tokens": 4096}
    text["relative_ci95"] = [0.04, 0.09]
    judged = {"scope": "mean", "measure": "accuracy", "delta": -0.02, "ci95": [-0.06, 0.02], "margin": 0.01}
    judged["verdict"] = "inconclusive"
    gate = {"state": "inconclusive", "passed": False, "reasons": [judged | {"code": "inconclusive"}]}
    write_json(full / "eval" / "comparison.json", {
        "compared": "after", "margins": {"accuracy": 0.01, "perplexity": 0.05, "kl": 0.1}, "status": "inconclusive",
        "judged": [judged], "mean_accuracy": mean, "tasks": {"piqa": {"acc": row}},
        "perplexity": {"held_out": text}, "problems": ["law: a problem"], "gate": gate,
    })  # fmt: skip
    shown = " ".join(page(full).text.split())
    for words in (
        "-2.0 [-6.0, +2.0] 0.77", "+6.7% [+4.0%, +9.0%] 0.01", "law: a problem", "corrected over the tasks (Holm)",
        "Quality gate: inconclusive.", "cannot tell mean accuracy over 1 task (100 documents) changed by -2.0 points",
    ):  # fmt: skip
        assert words in shown, words
    assert "p-values are not corrected" not in shown
    (full / "eval" / "after").rename(full / "eval" / "elsewhere")
    assert build_report(full)["compared"] is None  # and not believed where it is not


def test_several_runs_lie_on_one_plot(run_dir: Path, tmp_path: Path):
    smaller = write_run(tmp_path / "smaller")
    convert = json.loads((smaller / "convert.json").read_text())
    write_json(smaller / "convert.json", convert | {"sharing": "cla3"})
    kv = json.loads((smaller / "eval" / "after" / "kv_cache.json").read_text())
    write_json(smaller / "eval" / "after" / "kv_cache.json", kv | {"bytes_per_token": 256.0})
    different = write_run(tmp_path / "different")
    write_point(different, "before", specification="z" * 64)
    report = build_report(run_dir, [smaller, different])
    rows = {row["label"]: row for row in report["runs"]}
    assert list(rows) == ["source model", "run", "smaller", "different"]
    assert [row["kv_bytes_per_token"] for row in rows.values()] == [768.0, 384.0, 256.0, 384.0]
    assert [row["accuracy"] for row in rows.values()] == [0.6, 0.58, 0.58, None]
    assert not rows["different"]["comparable"]
    assert [row["held_out"] for row in rows.values()] == [30.0, 32.0, None, None]
    for folder, identity in ((run_dir, "a"), (smaller, "a"), (different, "b")):  # of the text, among others
        path = folder / "eval" / "before" / "held_out.json"
        write_json(path, json.loads(path.read_text()) | {"identity": identity})
    report = build_report(run_dir, [smaller, different])
    assert [row["held_out"] for row in report["runs"]] == [30.0, 32.0, 32.0, None]
    shown = Page((run_dir / "report.html").read_text())
    assert "measured differently" in shown.text and "Against other runs" in shown.text
    assert (run_dir / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert not (smaller / "report.html").exists()  # the others are only read


def test_runs_of_several_source_models_stand_below_their_own(run_dir: Path, tmp_path: Path):
    """One whose source is known from its conversion alone, too."""
    larger, same, third = (write_run(tmp_path / name) for name in ("larger", "same", "third"))
    for folder, source in ((larger, "another model"), (third, "another model"), (run_dir, "the model")):
        write_point(folder, "before", n=100 if folder == run_dir else 80)
        path = folder / "eval" / "before" / "results.json"
        write_json(path, json.loads(path.read_text()) | {"model_fingerprint": source})
    shutil.rmtree(same / "eval")
    convert = json.loads((same / "convert.json").read_text())
    write_json(same / "convert.json", convert | {"source": {"fingerprint": "the model"}})
    report = build_report(run_dir, [larger, same, third])
    rows = report["runs"]
    assert [row["label"] for row in rows] == [
        "source model of run", "run", "same", "source model of larger", "larger", "third",
    ]  # fmt: skip
    assert [row["accuracy"] for row in rows if row["point"] == "before"] == [0.6, 0.75]
    assert "each stands below its own" in Page((run_dir / "report.html").read_text()).text
    fronts = [[row["label"] for row in made] for made in by_source(rows)]
    assert fronts == [["source model of run", "run", "same"], ["source model of larger", "larger", "third"]]
    for row, kl in zip(rows, (None, 0.1, 0.2, None, 0.1, 0.2), strict=True):
        row["kl"] = kl  # a source model has none
    for axis in draw_pareto(rows).axes:
        assert sum(line.get_linestyle() == ":" for line in axis.lines) == 2  # none from one model's runs to another's
    assert not has_pareto([row | {"accuracy": None, "kl": None} for row in rows])
    unknown = [row | {"kv_bytes_per_token": None} if row["point"] == "before" else row for row in rows]
    assert not has_pareto(unknown)  # of what share their bytes are nobody knows
    accuracy = draw_pareto(rows).axes[0]  # as compared with their own source models
    places = {line.get_xydata()[0].tolist()[1] for line in accuracy.lines if line.get_marker() == "o"}
    assert max(places) == 0 and "from the source" in accuracy.get_ylabel()
    assert {text.get_text() for text in accuracy.texts} >= {"source model of run, source model of larger"}
    build_report(run_dir, [same])
    assert "each stands below its own" not in Page((run_dir / "report.html").read_text()).text


def test_a_comparison_has_what_was_measured_and_no_empty_columns(run_dir: Path, tmp_path: Path):
    """Where domains are off there is the KL on held-out text; and texts of the user's, where they are the same."""
    other = write_run(tmp_path / "other")
    for folder, kl in ((run_dir, 0.1), (other, 0.2)):
        path = folder / "eval" / "before" / "held_out.json"
        write_json(path, json.loads(path.read_text()) | {"identity": "a"})
        for point, factor in (("before", 1), ("converted", 4), ("after", 1 + kl)):
            for name in ("law", "mine"):
                text = {"perplexity": 10 * factor, "tokens": 9, "sha256": name if name == "law" else str(folder)}
                write_json(folder / "eval" / point / "perplexity" / f"{name}.json", text)
            if point != "before":
                write_json(folder / "eval" / point / "agreement.json", {"kl": kl, "top1": 0.9, "tokens": 9})
    found = runs.table(build_report(run_dir, [other])["runs"])
    titles = [column.title for column in found.columns]
    assert titles == [
        "run", "made by", "KV bytes per token", "KL, held-out", "wikitext", "law", "mine", "held-out perplexity",
        "accuracy, % [95% CI]",
    ]  # fmt: skip
    assert found.rows[1].cells[1] == "cla2-keep-ends, mean, distill, 4.1k tokens"
    assert [row.cells[3] for row in found.rows] == ["-", "0.1", "0.2"]
    assert [(row.cells[5], row.cells[6]) for row in found.rows] == [("-", "-"), ("+10.0%", "+10.0%"), ("+20.0%", "-")]


def test_of_a_run_without_an_accuracy_the_reason_is_told(run_dir: Path, tmp_path: Path):
    for name in ("unmeasured", "halfway", "relimited"):
        write_run(tmp_path / name)
    shutil.rmtree(tmp_path / "unmeasured" / "eval")
    for point in ("converted", "after"):
        shutil.rmtree(tmp_path / "halfway" / "eval" / point)  # interrupted after the source model
    write_point(tmp_path / "relimited", "after", specification="z" * 64)  # its source model was measured as ours
    others = [tmp_path / name for name in ("unmeasured", "halfway", "relimited")]

    def told(first: Path, others: list[Path]) -> dict[str, str]:
        rows = runs.table(build_report(first, others)["runs"]).rows
        return {"".join(map(str, row.cells[0])).split()[0]: "".join(map(str, row.cells[-1])) for row in rows}

    found = told(run_dir, others)
    assert found["unmeasured"] == found["halfway"] == "not measured"
    assert found["relimited"] == "measured differently"
    assert found["run"].startswith("58.0")
    assert set(told(others[0], [run_dir]).values()) == {"not measured"}  # there is nothing to be like


def test_a_run_whose_model_was_made_anew_since_says_so(run_dir: Path, tmp_path: Path):
    other = write_run(tmp_path / "other")
    (other / "uptrained").mkdir()
    (other / "uptrained" / "config.json").write_text("{}")
    report = build_report(run_dir, [other])
    assert [row["stale"] for row in report["runs"]] == [False, False, True]
    shown = Page((run_dir / "report.html").read_text()).text
    assert "other as it was before it was made anew" in " ".join(shown.split())


def test_runs_are_compared_by_kl_texts_and_how_they_learned(run_dir: Path, tmp_path: Path):
    other, alien = write_run(tmp_path / "other"), write_run(tmp_path / "alien")
    for folder, rows in ((run_dir, "a"), (other, "a"), (alien, "b")):
        write_domains(folder)
        for name in ("domains", "held_out"):
            path = folder / "eval" / "before" / f"{name}.json"
            write_json(path, json.loads(path.read_text()) | {"identity": rows})
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    recipe["train"] = {"loss": "distill", "cross_entropy_weight": 0.5}
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    steps = [{"step": i, "tokens": 10 * i, "loss": 1.0, "kl": float(i)} for i in range(1, 121)]
    checks = [{"tokens": 0, "validation_perplexity": 50.0}, {"tokens": 1200, "validation_perplexity": 40.0}]
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps + checks))
    write_point(other, "control")
    report = build_report(run_dir, [other, alien])
    source, run, second, control, third = report["runs"]
    assert control["label"] == "other, control" and control["sharing"] is None and control["held_out"] == 25.0
    assert (control["trained"], control["wikitext"]) == (second["trained"], pytest.approx(math.exp(-0.5) - 1))
    kls = [after for _, after, *_ in DOMAINS.values()]
    assert run["kl"] == second["kl"] == pytest.approx(sum(kls) / 3)
    assert run["domains"] == pytest.approx(math.exp(sum(kls) / 3) - 1)  # of such texts perplexity is 20 times e^KL
    assert third["kl"] is third["domains"] is None  # measured on other rows
    assert third["curves"]["validation"] == [] and second["curves"]["validation"] == [[0, 50.0], [1200, 40.0]]
    assert second["curves"]["kl"] == [[20 * i, 2 * i - 0.5] for i in range(1, 61)]  # a mean of two steps
    assert run["wikitext"] == pytest.approx(math.exp(0.2) - 1) and source["kl"] is source["wikitext"] is None
    assert (run["trained"], second["trained"]) == ("distill", "distill + 0.5 cross-entropy")
    assert [axis.get_ylabel() for axis in draw_pareto(report["runs"]).axes] == [
        "mean accuracy, %", "KL from the source, nats",
    ]  # fmt: skip
    assert (run_dir / "learning.png").exists() and {"pareto", "learning"} <= report["plots"].keys()
    shown = Page((run_dir / "report.html").read_text()).text
    for words in ("distill + 0.5 cross-entropy", "KL: from the source model, nats a token", "0.24"):
        assert words in shown, words


def test_the_pareto_front_keeps_what_nothing_beats():
    points = [(768, 0.60), (384, 0.58), (256, 0.58), (300, 0.50), (512, 0.61), (256, 0.40)]
    runs = [{"kv_bytes_per_token": size, "accuracy": accuracy} for size, accuracy in points]
    front = [(run["kv_bytes_per_token"], run["accuracy"]) for run in pareto_front(runs)]
    assert front == [(256, 0.58), (512, 0.61)]
    runs = [{"kv_bytes_per_token": size, "kl": kl} for size, kl in ((384, 0.1), (256, 0.3), (300, 0.4), (512, 0.2))]
    assert [run["kl"] for run in pareto_front(runs, QUALITIES[1])] == [0.3, 0.1]  # of KL the smaller is the better


def test_every_cell_says_on_a_phone_what_it_is(full: Path):
    build_report(full)
    html = (full / "report.html").read_text()
    tables = re.findall(r'<table class="cards.*?</table>', html, re.DOTALL)
    assert len(tables) > 6
    for table in tables:
        names = re.findall(r'<th scope="col".*?>(.*?)</th>', table)
        for row in re.findall(r'<tr class="[^"]*"><th scope="row">.*?</tr>', table, re.DOTALL):
            assert re.findall(r'data-label="(.*?)"', row) == names[1:]


def test_text_of_plots_is_legible_on_a_phone(full: Path, tmp_path: Path):
    """Every picture has a narrow twin, whose smallest text is 10 pixels and more at a width of 390."""
    other = write_run(tmp_path / "other")
    build_report(full, [other])
    svgs = re.findall(r"<svg class=.*?</svg>", (full / "report.html").read_text(), re.DOTALL)
    assert [re.search(r'class="(.*?)"', svg)[1] for svg in svgs] == ["wide", "narrow"] * 3  # type: ignore[index]
    for svg in svgs[1::2]:
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])  # type: ignore[index]
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
        assert sizes and min(sizes) * (390 - 2 * 29) / width >= 10


def test_pictures_on_a_desk_are_as_wide_as_the_page_and_show_the_level_of_the_source(full: Path):
    build_report(full)
    text = (full / "report.html").read_text()
    widths = [float(one) for one in re.findall(r'class="wide".*?viewBox="0 0 ([\d.]+)', text)]
    assert widths and min(widths) > 500 and "max-width: 38rem" not in text
    checks = [{"tokens": 1000 * i, "validation_perplexity": 40.0 - i, "loss": 1.0} for i in range(5)]
    axis = draw_curves(checks, [], 30.0).axes[1]
    low, high = axis.get_ylim()
    assert (30.0 - low) / (high - low) > 0.1


def test_the_picture_of_the_map_has_a_legend(full: Path):
    report = build_report(full)
    for groups, words in (
        (report["sharing"]["groups"],
         ["shares with no other", "owns K/V", "reads them", "least damage 0.02", "most damage 0.04"]),
        ([group | {"damage": None, "heat": None} for group in report["sharing"]["groups"]],
         ["shares with no other", "owns K/V", "reads them"]),
    ):  # fmt: skip
        figure = draw_sharing(report["converted"]["kv_source_layers"], groups)
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == words


def test_pareto_intervals_are_paired_and_stay_in_bounds(run_dir: Path, tmp_path: Path):
    report = build_report(run_dir, [write_run(tmp_path / "other")])
    source, run, other = report["runs"]
    low, high = report["mean_accuracy"]["ci95"]
    assert source["ci95"] is None and run["ci95"] == other["ci95"] == pytest.approx([0.6 + low, 0.6 + high])
    assert 0 <= run["ci95"][0] < run["accuracy"] < run["ci95"][1] <= 1
    lines = draw_pareto(report["runs"]).axes[0].lines
    assert sum(list(line.get_ydata()) == pytest.approx([100 * end for end in run["ci95"]]) for line in lines) == 2
    assert [text.get_text() for text in draw_pareto(report["runs"]).axes[0].texts] == ["source model", "run, other"]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_chromium_renders_it_light_dark_and_narrow(full: Path, tmp_path: Path):
    build_report(full)
    html = (full / "report.html").as_uri()
    light, dark = (screenshot(tmp_path, html, 1100, 1400, scheme) for scheme in ("light", "dark"))
    assert light[2, 2].min() > 230 and dark[2, 2].max() < 40  # the page's ground
    for picture in (light, dark):
        ground = picture[2, 2].astype(int)
        ink = np.abs(picture.astype(int) - ground).max(axis=2) > 90
        assert 0.005 < ink.mean() < 0.25  # text and tables, neither a blank page nor a broken one
        assert ink[:200].any() and ink[-200:].any()
    # On a phone tables scroll by themselves: nothing reaches into the margin, so the page does not scroll sideways.
    phone = screenshot(tmp_path, html, 400, 5000, "light")
    assert (phone[:, -4:] == phone[2, 2]).all()


def screenshot(folder: Path, url: str, width: int, height: int, scheme: str) -> np.ndarray:
    """What Chromium shows, as RGB [height, width, 3]."""
    from PIL import Image

    out = folder / f"{scheme}-{width}.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    command = [CHROMIUM or "", *FLAGS, *dark, f"--user-data-dir={folder / f'profile-{scheme}-{width}'}",
               f"--window-size={width},{height}", f"--screenshot={out}", url]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return np.asarray(Image.open(out).convert("RGB"))
