"""The pack of domains: its texts, which of them a training text touched, what is measured, and what the report says."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cla_convert.evaluation.agreement import agreement
from cla_convert.evaluation.domains.overlap import RUN, contained, overlap
from cla_convert.evaluation.domains.pack import NAMES, WINDOW, documents, domain_rows
from cla_convert.evaluation.perplexity import token_perplexity
from cla_convert.evaluation.texts import Texts, measure_texts
from cla_convert.files import write_json
from cla_convert.models.export import load_model
from cla_convert.recipe import Evaluate
from cla_convert.report.last_lines import last_lines
from cla_convert.report.report import build_report
from cla_convert.report.sections.domains import domain_advice
from cla_convert.run_folder import RunFolder
from tests.conftest import byte_tokenizer, save_tiny_llama
from tests.unit.run_files import write_domains

PACK = Path(__file__).parents[2] / "cla_convert" / "evaluation" / "domains"
COMMON = {"batch_size": 2, "device": "cpu", "dtype": "float32"}


def test_every_domain_is_there_and_what_the_readme_says():
    readme = (PACK / "README.md").read_text()
    assert {path.stem for path in PACK.glob("*.jsonl")} == set(NAMES)
    for name in NAMES:
        size = sum(len(text.encode()) for text in documents(name))
        assert 20_000 < size < 40_000
        digest = hashlib.sha256((PACK / f"{name}.jsonl").read_bytes()).hexdigest()
        assert f"| {size} |" in readme and digest[:16] in readme


def test_rows_hold_the_texts_and_a_cpu_reads_one_of_each():
    tokenizer = byte_tokenizer()
    whole = domain_rows(tokenizer, "auto", "cuda")
    assert list(whole) == list(NAMES)
    text = str(tokenizer.decode(whole["law"].flatten()))
    assert text.startswith(documents("law")[0]) and "<|eos|>" + documents("law")[1][:100] in text
    cpu = domain_rows(tokenizer, "auto", "cpu", first=[0])
    assert all(rows.shape == (1, WINDOW) and rows[0, 0] == 0 for rows in cpu.values())
    assert all((cpu[name][0, 1:] == whole[name][0, 1:]).all() for name in NAMES)
    assert domain_rows(tokenizer, 0, "cuda") == {}
    assert domain_rows(tokenizer, 1300, "cpu", positions=128)["web"].shape == (10, 128)
    few = domain_rows(tokenizer, 100, "cuda", first=[0])  # fewer than a row: a shorter one, and not none
    assert all(rows.shape == (1, 100) and (rows == cpu[name][:, :100]).all() for name, rows in few.items()) and few
    with pytest.raises(ValueError, match="nothing is predicted"):
        Evaluate(domain_tokens=1)


def words(seed: int, size: int, low: int, high: int) -> np.ndarray:
    """Text of one kind: a few words of its own between words that everybody uses."""
    rng = np.random.default_rng(seed)
    own = rng.integers(low, high, size)
    return np.where(rng.random(size) < 0.5, rng.integers(0, 50, size), own).astype(np.uint16)


def test_a_domain_is_touched_if_the_training_text_holds_text_of_its_kind():
    """Nine tenths of one kind, one tenth of another; a third is absent, and a fourth is there word for word."""
    copied = words(9, 64, 900, 1000)
    train = np.concatenate([words(0, 9000, 100, 300), words(1, 1000, 300, 400), copied])
    held_out = np.concatenate([words(2, 900, 100, 300), words(3, 100, 300, 400)])
    domains = {
        "much": words(4, 640, 100, 300), "little": words(5, 640, 300, 400), "none": words(6, 640, 500, 600),
        "copied": np.concatenate([copied, words(7, 576, 700, 900)]),
    }  # fmt: skip
    found = overlap(train, held_out, {name: ids.reshape(-1, 64) for name, ids in domains.items()})
    assert {name: row["touched"] for name, row in found.items()} == {
        "much": True, "little": True, "none": False, "copied": True,
    }  # fmt: skip
    assert found["copied"]["contained"] == pytest.approx(1 / 10) and found["none"]["contained"] == 0
    assert found["much"]["similarity"] > found["none"]["similarity"]
    assert found["none"]["similarity"] < found["none"]["held_out_similarity"] < 1
    unknown = overlap(train, held_out[:10], {"much": domains["much"].reshape(-1, 64)})
    assert unknown["much"]["touched"] is None


def test_what_is_contained_is_found_wherever_it_stands(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cla_convert.evaluation.domains.overlap._CHUNK", 50)
    text = np.random.default_rng(0).integers(0, 1000, 400)
    for start in (0, 40, 49, 50, 400 - 2 * RUN):
        assert contained(text, {"here": text[None, start : start + 2 * RUN]}) == {"here": 1.0}
    changed = text[None, 100 : 100 + 2 * RUN].copy()
    changed[0, RUN] += 1  # the only run without it is the first
    found = contained(text, {"changed": changed, "too short": text[None, : RUN - 1], "there": text[None, :RUN]})
    assert found == {"changed": pytest.approx(1 / (RUN + 1)), "too short": 0.0, "there": 1.0}
    assert contained(text[: RUN - 1], {"changed": changed}) == {"changed": 0.0}


def test_domains_are_measured_at_every_point(tmp_path: Path):
    source, other = (save_tiny_llama(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    rows = {"law": torch.randint(2, 258, (3, 20)), "code": torch.randint(2, 258, (2, 20))}
    texts = Texts(source=source, domains=rows)
    before = measure_texts(texts, source, tmp_path / "before", COMMON, "source", device="cpu")["domains"]["domains"]
    after = measure_texts(texts, other, tmp_path / "after", COMMON, "other", device="cpu")["domains"]["domains"]
    models = load_model(source), load_model(other)
    for name, ids in rows.items():
        assert before[name]["perplexity"] == pytest.approx(token_perplexity(models[0], ids)["perplexity"])
        assert after[name]["perplexity"] == pytest.approx(token_perplexity(models[1], ids)["perplexity"], rel=1e-5)
        assert after[name]["kl"] == pytest.approx(agreement(models[1], models[0], ids)["kl"], rel=1e-5)
        assert "kl" not in before[name] and before[name]["tokens"] == after[name]["tokens"] == ids.numel()
    written = json.loads((tmp_path / "after" / "domains.json").read_text())
    assert written["domains"] == after


def test_the_report_shows_the_worst_first_and_what_to_do(run_dir: Path):
    write_domains(run_dir)
    report = build_report(run_dir)
    assert list(report["domains"]) == ["code", "law", "news"]
    law = report["domains"]["law"]
    assert law["perplexity"] == pytest.approx(
        {"before": 20, "converted": 20 * math.exp(0.4), "after": 20 * math.exp(0.1)}
    )
    assert law["kl"] == {"converted": 0.4, "after": 0.1} and law["recovered"] == pytest.approx(0.75)
    assert law["relative"] == pytest.approx(math.exp(0.1) - 1) and law["touched"] is False
    far, copied = report["domain_advice"]
    assert "holds nothing of the kind: code (+82.2%), law (+10.5%)" in far and "generate: auto" in far
    assert copied.startswith("news:") and "too good" in copied
    text = (run_dir / "report.md").read_text()
    assert text.index("| code | no |") < text.index("| law | no |") < text.index("| news | yes |")
    assert far in text and "512 tokens a domain" in text


def test_text_files_stand_among_the_domains(run_dir: Path):
    """Also one of a domain's name; and a run that was measured before there was a KL of them is reported as ever."""
    write_domains(run_dir)
    for point, perplexity in (("before", 10.0), ("converted", 30.0), ("after", 12.0)):
        for name in ("law", "mine"):
            measured = {"perplexity": perplexity, "tokens": 9000}
            write_json(run_dir / "eval" / point / "perplexity" / f"{name}.json", measured)
    before = build_report(run_dir)
    assert list(before["domains"]) == ["code", "law", "news"] and before["text_agreement"] == {}
    for point, kl in (("converted", 2.0), ("after", 0.7)):
        for name in ("law", "mine"):
            ci95 = {"kl": [kl - 0.1, kl + 0.1], "top1": [0.7, 0.9]}
            found = {"kl": kl + (name == "law") * 0.1, "top1": 0.8, "tokens": 8192, "ci95": ci95, "windows": []}
            write_json(run_dir / "eval" / point / "agreement" / f"{name}.json", found)
    known = json.loads((run_dir / "eval" / "domains.json").read_text())
    mine = {"touched": True, "contained": 0.0, "similarity": 0.6, "held_out_similarity": 0.5}
    write_json(run_dir / "eval" / "domains.json", known | {"texts": {"mine": mine}})
    report = build_report(run_dir)
    assert list(report["domains"]) == ["law (own text)", "mine", "code", "law", "news"]
    row = report["domains"]["mine"]
    assert row["perplexity"] == {"before": 10.0, "converted": 30.0, "after": 12.0} and row["own"] and row["touched"]
    assert row["kl"] == {"converted": 2.0, "after": 0.7} and row["recovered"] == pytest.approx(0.65)
    assert {name: row for name, row in report["domains"].items() if not row["own"]} == before["domains"]
    assert report["text_agreement"]["mine"]["after"] == {"kl": 0.7, "top1": 0.8, "tokens": 8192, "ci95": ci95}
    assert report["judged"] == before["judged"]  # held-out text is what the margin of KL is for
    text = (run_dir / "report.md").read_text()
    assert "| mine | yes | 10" in text and "on their beginning: law (own text), 8" in text
    assert "mine (+20.0%). Give it more weight" in " ".join(report["domain_advice"])
    assert "mine 0.7" in " ".join(last_lines(report, RunFolder(run_dir)))


def test_advice_follows_what_was_trained_on():
    def row(relative: float | None, touched: bool | None) -> dict:
        return {"relative": relative, "touched": touched, "contained": 0.0}

    assert "more weight" in domain_advice({"law": row(0.3, True)})[0]
    assert domain_advice({"law": row(0.04, False)}) == ["No domain is more than 5% above the source's perplexity."]
    assert domain_advice({"law": row(None, None)}) == domain_advice({}) == []
    assert "Far from the source: law (+30.0%)" in domain_advice({"law": row(0.3, None)})[0]


def test_without_training_the_conversion_is_judged(run_dir: Path):
    write_domains(run_dir)
    for name in ("eval/after", "train.json"):
        (run_dir / name).rename(run_dir / f"no-{name.replace('/', '-')}")
    domains = build_report(run_dir)["domains"]
    assert domains["law"]["recovered"] is None and domains["law"]["perplexity"]["after"] is None
    assert domains["law"]["relative"] == pytest.approx(math.exp(0.4) - 1)
