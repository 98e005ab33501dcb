"""Every cla-convert line of the README runs, in its order, on a tiny model and small budgets."""

import re
import runpy
import shlex
from pathlib import Path

from tests.launch import cla_anew

README = Path(__file__).parents[2] / "README.md"
SMALL_TRAINING = [
    "train.sequence_length=64", "train.batch_tokens=256", "train.validation_tokens=256", "train.precision=float32",
]  # fmt: skip
SMALL_EVAL = ["eval.limit=1", "eval.tasks=[openbookqa,wikitext]", "eval.max_length=512", "eval.limits={wikitext: 1}"]
SMALL_CALIBRATION = ["convert.calibration={tokens: 512, sequence_length: 64}"]
EXTRA = {
    "run": [*SMALL_TRAINING, *SMALL_EVAL, *SMALL_CALIBRATION],
    "uptrain": [*SMALL_TRAINING, *SMALL_CALIBRATION],
    "eval": SMALL_EVAL,
    "convert": SMALL_CALIBRATION,
}
SMALL_BENCH = ["--memory", "2MB", "--batch-sizes", "1", "--prompt", "16", "--new", "4"]


def commands() -> list[list[str]]:
    lines = re.findall(r"^ {4}cla-convert (.*)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_commands_of_the_readme(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setenv("CLA_CONVERT_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "my-corpus"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i}.txt").write_text(f"Document {i}. " + "The quick brown fox jumps over the lazy dog. " * 30)
    seen = set()
    for words in commands():
        verb = words[0]
        seen.add(verb)
        words = [
            str(tiny_llama) if word == "MODEL" else word.replace("100M", "2k").replace("26M", "2k") for word in words
        ]
        if verb == "run":  # the recipe names a hub model and hub data, which a test cannot reach
            words += ["--set", f"source.model={tiny_llama}", "--set", "data.sources=[{path: my-corpus/}]"]
            words += ["--set", "train.tokens=2k"]
        if verb == "bench":
            words += SMALL_BENCH
        for extra in EXTRA.get(verb, []):
            words += ["--set", extra]
        done = cla_anew(*words, cwd=tmp_path)  # what each verb imports, it imports by itself
        assert done.returncode == 0, f"{words}\n{done.stderr}"
    assert {"inspect", "recipes", "run", "convert", "uptrain", "eval", "verify", "bench"} <= seen
    assert (tmp_path / "runs" / "mine" / "report.md").exists()


def test_make_targets_of_the_readme_exist():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^ {4}make (\w+)", README.read_text(encoding="utf-8"), re.MULTILINE):
        assert f"\n{target}:" in makefile, target


def test_the_picture_is_what_its_script_draws(capsys):
    runpy.run_path(str(README.parent / "benchmarks" / "draw_sharing_map.py"), run_name="__main__")
    assert capsys.readouterr().out == (README.parent / "docs" / "sharing-map.svg").read_text(encoding="utf-8")


def test_links_of_the_documentation_lead_somewhere():
    for page in [README, *README.parent.joinpath("docs").glob("*.md"), README.parent / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
