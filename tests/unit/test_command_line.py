"""What a command line is told that is wrong: in our own words, before any work, the truest reason first."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cla_convert import console
from cla_convert.cli import app, main
from cla_convert.errors import ClaError
from cla_convert.refusals import is_refusal, refusal
from tests.conftest import save_tiny_llama
from tests.tiny import cla_model

ROOT = Path(console.__file__).parent.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder, which the tests work in, with a model `source`, its conversion `converted` and what is broken."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_llama(folder / "source")
    cla_model("llama", [0, 0, 2, 2, 4, 4]).save_pretrained(folder / "converted")
    shutil.copytree(folder / "source", folder / "broken")
    (folder / "broken" / "config.json").write_text('{"model_type": "llama",')
    (folder / "unfinished").mkdir()
    shutil.copy(folder / "broken" / "config.json", folder / "unfinished")
    (folder / "file").write_text("text")
    (folder / "begun").mkdir()
    (folder / "begun" / "recipe.yaml").write_text("source: {model: source}\n")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def refused(line: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and stderr of a command line that does not succeed."""
    monkeypatch.setattr(sys, "argv", ["cla-convert", *line.split()])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(console, "_quiet", False)
    with pytest.raises(SystemExit) as ended:
        main()
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    said = re.sub(r"\A.* \.\.\.\n", "", said)  # what is said before torch is imported
    assert said.startswith("error: ") and "Traceback" not in said
    return int(ended.value.code or 0), said


THEIRS = re.compile(r"Input should|value_error|Invalid value|unable to parse|valid (integer|number|tuple)|constrained-|"
                    r"function-|literal\[|Expected one of|Usage:|\[Errno|unexpected extra")  # fmt: skip
"""Words of pydantic, click, torch and Python."""


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        # In the order of the arguments, the truest reason first.
        ("uptrain nothere tr", 3, "There is no folder nothere"),
        ("uptrain convertd tr", 3, "Did you mean 'converted'?"),
        ("uptrain source tr", 3, "source is not a converted model"),
        ("uptrain unfinished tr", 3, "config.json cannot be read"),
        ("uptrain converted source", 3, "source exists"),
        ("uptrain converted file/tr", 3, "file is a file"),
        ("uptrain converted tr", 2, "Give --tokens"),
        ("uptrain converted tr --tokens 1k", 3, "smaller than one sequence"),
        ("uptrain converted tr --tokens 99k", 2, "Give --teacher MODEL"),
        ("convert nothere/x/y source", 3, "There is no model at 'nothere/x/y'"),
        ("convert source source", 3, "source is not empty\n  fix: Give another folder.\n"),
        ("convert source file", 3, "file is a file"),
        ("convert source file/x", 3, "file is a file"),
        ("bench converted source", 2, "cla-convert bench source converted"),
        ("bench source source", 2, "source is not a converted model"),
        ("bench source converted --out file", 3, "file is a file"),
        ("eval source --out file", 3, "file is a file"),
        ("verify nothere", 3, "There is no folder nothere"),
        ("verify source", 3, "source is not a converted model"),
        ("chat source --beside ./source", 2, "would answer twice"),
        ("chat broken", 3, "broken/config.json cannot be read\n  why: From line 1, column 2"),
        ("chat unfinished", 3, "unfinished/config.json cannot be read"),
        ("chat begun", 3, "It has no config.json"),
        ("report begun", 3, "`cla-convert run begun/recipe.yaml --out begun`"),
        ("report nothere", 3, "nothere is not a run folder"),
        # Options of a wrong type or out of range.
        ("chat source --max-new-tokens x", 2, "--max-new-tokens: 'x' is not a whole number of 1 or more"),
        ("chat source --max-new-tokens 0", 2, "is not a whole number of 1 or more"),
        ("chat source --max-new-tokens -5", 2, "is not a whole number of 1 or more"),
        ("chat source --max-new-tokens 512", 2, "source was built for 512 tokens"),
        ("chat source --temperature -1", 2, "--temperature: '-1' is not a number of 0 or more"),
        ("chat source --temperature nan", 2, "'nan' is not a number"),
        ("bench source converted --prompt 1.5", 2, "--prompt: '1.5' is not a whole number"),
        ("bench source converted --new 1", 2, "--new: '1' is not a whole number of 2 or more"),
        ("bench source converted --seconds x", 2, "--seconds: 'x' is not a number"),
        ("bench source converted --memory much", 2, "--memory: 'much' is not a size"),
        ("-q bench source converted --memory 1KB", 3, "The weights alone take 2"),
        ("convert source out --kv-budget x", 2, "--kv-budget: 'x' is not a number"),
        ("convert source out --kv-budget 2 --sharing auto", 2, "--kv-budget: must be 1 or less (got 2.0)"),
        ("convert source out --dtype float17", 2, "--dtype: must be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ("eval source --limit x", 2, "--limit: 'x' is not a whole number"),
        ("eval source --backend tgi", 2, "--backend: must be 'hf' or 'vllm' (got 'tgi')"),
        ("eval source --tasks ,", 2, "No tasks to evaluate"),
        ("eval ./nothere", 3, "There is no model at './nothere'"),
        ("uptrain converted tr --tokens many", 2, "--tokens: 'many' is not a number of tokens"),
        ("run demo --out run --set train.learning_rate=abc", 2, "learning_rate: must be a number, or 'auto' (got"),
        ("run demo --out run --set train.micro_batch_size=0", 2, "must be 1 or more, or 'auto' (got 0)"),
        ("run demo --out run --set eval.domain_tokens=x", 2, "such as 500k, 26M or 2B, or 'auto'"),
        ("run demo --out run --set eval.gate=maybe", 2, "must be true or false, or 'strict' (got 'maybe')"),
        ("run demo --out run --set convert.sharing=[a]", 2, "sharing.0: must be a whole number, or a list (got 'a')"),
        ("run demo --out run --set convert.sharing=5", 2, "convert.sharing: must be text, or a list (got 5)"),
        ("run demo --out run --set train.betas=x", 2, "train.betas: must be a list (got 'x')"),
        ("run demo --out run --set train.learning_rates={all:1}", 2, "train.learning_rates"),
        ("run demo --out run --set source.dtype=int8", 2, "source.dtype: must be 'auto'"),
        ("run demo --out run --set convert.calibration.tokens=0", 2, "must be greater than 0, or 'auto' (got 0)"),
        ("run demo --out run --set train.warmup=2", 2, "train.warmup: must be 1 or less (got 2)"),
        # Devices.
        ("bench source converted --device gpu", 2, "Did you mean 'cuda'?"),
        ("chat source --device gpu:1", 2, "Did you mean 'cuda:1'?"),
        ("chat source --device cudaa", 2, "Did you mean 'cuda'?"),
        ("chat source --device meta", 2, "fix: Use --device cpu"),
        ("eval source --set device=gpu", 2, "fix: Use --set device=cpu"),
        # Command lines that click refuses.
        ("convert source", 2, "Missing argument 'DIR'\n  fix: cla-convert convert --help says what it takes. Example:"),
        ("convert source out --shairing cla2", 2, "No such option: --shairing"),
        ("convert source out more", 2, "More arguments than there are places for (more)"),
        ("convrt source out", 2, "Did you mean 'convert'"),
        ("recipes show", 2, "Missing argument 'NAME'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_first_and_in_our_own_words(
    line: str, code: int, words: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, said = refused(line, monkeypatch)
    assert words in said and not THEIRS.search(said), said
    assert found == code
    assert sorted(path.name for path in models.iterdir()) == [
        "begun", "broken", "converted", "file", "source", "unfinished"
    ], "nothing is left behind"  # fmt: skip


def test_a_bad_teacher_is_named_before_the_missing_text(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = models.parent / "no_text.yaml"
    recipe.write_text(
        "data: {sources: [{path: no.txt}]}\ntrain: {tokens: 99k, sequence_length: 64, batch_tokens: 960}\n"
    )
    line = f"-q uptrain converted tr --recipe {recipe} --teacher"
    assert "There is no model at './no'" in refused(f"{line} ./no", monkeypatch)[1]


PATHS = [
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOSPC,
    errno.EROFS,
]


@pytest.mark.parametrize("number", PATHS)
def test_what_the_system_says_of_a_path_anywhere_is_said_like_any_mistake(
    number: int, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "/a/.out.partial-12/config.json")

    monkeypatch.setattr("cla_convert.conversion.inspect.inspect_model", refuses)
    code, said = refused("inspect source", monkeypatch)
    assert code == 3 and said.startswith("error: /a/out/config.json cannot be used\n  why: ") and "\n  fix: " in said
    assert os.strerror(number) not in said and "Errno" not in said


FIRST_WORDS = """
import os, sys
from cla_convert.cli import main

class Said:
    encoding = "utf-8"
    isatty = lambda self: False
    flush = lambda self: None
    def write(self, text):
        heavy = sorted({"torch", "transformers", "lm_eval", "matplotlib"} & set(sys.modules))
        os.write(1, f"{text.strip()[:80]} {heavy}".encode())
        os._exit(0)

sys.stdout = sys.stderr = Said()
main()
"""


@pytest.mark.parametrize(
    "line",
    [
        "inspect source", "convert source out", "verify converted", "chat converted",
        "uptrain converted out --tokens 1M",
        "run demo --out out", "run demo --out out --dry-run", "eval source", "bench source converted", "report begun",
        "env", "recipes ls",
    ],
)  # fmt: skip
def test_something_is_said_before_what_takes_seconds_to_import(models: Path, line: str) -> None:
    words = [sys.executable, "-c", FIRST_WORDS, *line.split()]
    done = subprocess.run(words, capture_output=True, text=True, cwd=models, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.strip().endswith(" []"), done.stdout + done.stderr


def test_what_is_no_mistake_of_a_users_stays_a_bug() -> None:
    assert not is_refusal(OSError("the server hung up"))
    assert not is_refusal(OSError(errno.EBADF, "Bad file descriptor"))
    assert not is_refusal(FileNotFoundError(errno.ENOENT, "No such process"))  # no path
    assert is_refusal(OSError(errno.ENOSPC, "No space left on device"))  # a write knows no name
    assert "cannot be written" in refusal(OSError(errno.ENOSPC, "No space left on device")).what


@pytest.mark.parametrize("line", [["recipes"], []])
def test_nothing_asked_for_is_answered_with_the_help(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cla-convert", *line])
        patch.setattr("signal.signal", lambda *_: None)
        with pytest.raises(SystemExit) as ended:
            main()
    printed = capsys.readouterr()
    assert ended.value.code == 2 and "Commands:" in printed.out and "error" not in printed.err


def every_command(command: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, object]]:
    for name, one in getattr(command, "commands", {}).items():
        yield " ".join((*path, name)), one
        yield from every_command(one, (*path, name))


def test_every_verb_has_an_example_and_names_of_its_own_for_what_it_takes() -> None:
    from typer.main import get_command

    commands = dict(every_command(get_command(app)))
    assert {"convert", "env", "recipes", "recipes ls", "recipes cp"} <= commands.keys()
    for name, command in commands.items():
        assert f"cla-convert {name}" in (command.epilog or ""), f"{name} has no example"  # type: ignore[attr-defined]
        for parameter in command.params:  # type: ignore[attr-defined]
            flag = parameter.param_type_name == "option" and (parameter.is_flag or parameter.name == "help")
            assert flag or (parameter.metavar or "").isupper() or parameter.metavar, f"{name}: {parameter.name}"


def test_inspect_counts_a_small_model_in_thousands(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["inspect", "source"], standalone_mode=False)
    assert capsys.readouterr().out.startswith("source: llama, 64k parameters in float32\n")


def test_a_gate_without_results_says_which_command_makes_them(models: Path, tmp_path: Path) -> None:
    run = shutil.copytree(models / "begun", tmp_path / "run")
    (run / "plan.json").write_text(json.dumps({"kv_source_layers": [0]}))
    with pytest.raises(ClaError) as caught:
        app(["report", str(run), "--gate"], standalone_mode=False)
    assert caught.value.exit_code == 4 and "not been evaluated" in str(caught.value)
    assert "Uptrain longer" not in str(caught.value) and "cla-convert run" in caught.value.fix
