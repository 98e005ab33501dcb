"""What a command line is told that is wrong: in our own words, before any work, the truest reason first."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cla_convert import cli, console
from cla_convert.cli import app, main
from cla_convert.cli.words import check_words, texts_in
from cla_convert.conversations import Conversations
from cla_convert.environment import cache_folder, command_line, stop_signals
from cla_convert.errors import ClaError, InputError, Stopped
from cla_convert.files import alone_in, check_free, check_place
from cla_convert.recipe import Recipe
from cla_convert.refusals import is_refusal, refusal
from cla_convert.run_folder import RunFolder, alone_around
from cla_convert.staging import beside, lock
from tests.conftest import byte_tokenizer, save_tiny_llama
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
    for name in ("one", "two"):
        shutil.copytree(folder / "source", folder / "several" / name)
    shutil.copy(folder / "broken" / "config.json", folder / "unfinished")
    (folder / "file").write_text("text")
    (folder / "begun").mkdir()
    (folder / "begun" / "recipe.yaml").write_text("source: {model: source}\n")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def words_of(line: str) -> list[str]:
    """`%` is an empty one."""
    return ["" if word == "%" else word for word in line.split()]


def refused(line: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and stderr of a command line that does not succeed."""
    monkeypatch.setattr(sys, "argv", ["cla-convert", *words_of(line)])
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
        ("uptrain converted tr --tokens 1k", 2, "less than one sequence"),
        ("uptrain converted tr --tokens 99k", 2, "Give --teacher MODEL"),
        ("convert nothere/x/y source", 3, "There is no model at 'nothere/x/y'"),
        ("convert source source", 3, "source is not empty\n  fix: Give another folder.\n"),
        ("convert source file", 3, "file is a file"),
        ("convert source file/x", 3, "file is a file"),
        ("run recipes/dmeo.yaml --out r", 2, "Did you mean 'demo'?"),
        ("run demo --out r --set TRAIN.tokens=5", 2, "--set: unknown key 'TRAIN'. Did you mean 'train'?"),
        ("run demo --out r --set train.foo.bar=5", 2, "--set: unknown key 'train.foo'."),
        ("run demo --out r --set train..tokens=5", 2, "--set 'train..tokens=5' is not of the form a.b=value"),
        ("uptrain converted tr --tokens 26M --teacher ./converted", 2, "./converted would be its own teacher"),
        *((line, 3, "Give a model in it: several/one, several/two.") for line in (
            "verify several", "chat several", "uptrain several tr --tokens 1M", "inspect several", "eval several",
            "bench several converted", "bench source several", "convert several out",
        )),
        ("--set a=b run demo", 2, "--set stands before the verb"),
        ("bench source converted --memory 8", 2, "--memory 8GB"),
        ("uptrain converted ./converted --tokens 2k", 2, "is the model to train"),
        ("inspect source --revision main", 2, "Leave --revision out"),
        ("convert source out --revision main", 2, "Leave --revision out"),
        ("convert source out --set source.revision=1e5", 2, "Revisions are of models of the hub, and source is here"),
        ("convert source out --set source.revision=1e5 --dry-run", 2, "Revisions are of models of the hub"),
        ("-q run demo --out run --set source.model=./source --set source.revision=1e5", 2, "'1e5' was asked for"),
        ("eval source --revision main", 2, "Leave --revision out"),
        ("inspect Qwen/Qwen3-0.6B/", 3, "Did you mean 'Qwen/Qwen3-0.6B'?"),
        ("inspect source/config.json", 3, "Give its folder: source"),
        ("convert source out --sharing CLA2", 2, "Did you mean 'cla2'?"),
        ("run demo --out r --set data.sources.0.path=t", 2, "as --set 'data.sources=[...]'"),
        ("run demo --out r --set data.sources[0].path=t", 2, "as --set 'data.sources=[...]'"),
        ("-q run demo --out r --set source.model=converted", 3, "already a Cross-Layer Attention model"),
        ("run source --out r", 2, "source is a folder, not a recipe"),
        ("run begun --out r", 2, "begun/recipe.yaml"),
        ("run Qwen/Qwen3-0.6B --out r", 2, "Qwen/Qwen3-0.6B is a model, not a recipe"),
        ("run source/config.json --out r", 2, "more."),
        ("report begun begun", 2, "begun would be compared with itself"),
        ("report begun ./begun/", 2, "begun would be compared with itself"),
        ("bench converted source", 2, "cla-convert bench source converted"),
        ("bench source source", 2, "source would be compared with itself"),
        ("bench converted ./converted", 2, "converted would be compared with itself"),
        ("convert source .", 3, ". is the folder that you are in"),
        ("convert source ..", 3, ".. is the folder that you are in, or above it"),
        ("uptrain converted . --tokens 99k", 3, " exists\n"),
        ("inspect https://huggingface.co/Qwen/Qwen3-8B/tree/main", 3, "Did you mean 'Qwen/Qwen3-8B'?"),
        ("inspect hf://Qwen/Qwen3-8B", 3, "Did you mean 'Qwen/Qwen3-8B'?"),
        ("run demo --out run --set seed=99999999999999999999", 2, "--set: seed: must be less than 4.29497e+09"),
        ("run demo --out run --set train.tokens=99999999999T", 2, "--set: train.tokens: must be less than"),
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
        ("eval source --tasks ,", 2, "No tasks to evaluate, and no texts"),
        ("eval source --perplexity nothere.txt", 3, "eval.perplexity nothere: nothere.txt cannot be read"),
        ("eval source --perplexity a/b.txt --perplexity b.txt", 3, "eval.perplexity b: a/b.txt cannot be read"),
        ("eval source --tasks piqa --perplexity piqa.txt", 3, "eval.perplexity piqa-2: piqa.txt cannot be read"),
        ("eval source --perplexity wikitext.txt", 3, "eval.perplexity wikitext: wikitext.txt cannot be read"),
        ("eval ./nothere", 3, "There is no model at './nothere'"),
        ("eval ./nothere", 3, "why: Relative paths count from the folder that you are in, /"),
        ("eval source --task-data no", 3, "There is no folder no\n  why: Relative paths count from the folder"),
        ('-q convert source out --set data.sources=[{"path":"x"}]', 3, "no such file or folder. Relative paths count"),
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
        "begun", "broken", "converted", "file", "several", "source", "unfinished"
    ], "nothing is left behind"  # fmt: skip


@pytest.mark.parametrize(("line", "word"), [
    ("convert source %", "source"), ("run demo --out %", "--out"), ("uptrain converted %", "converted"),
    ("run % --out x", "run"), ("eval source --tasks %", "--tasks"), ("inspect %", "inspect"),
])  # fmt: skip
def test_an_empty_argument_is_not_taken_for_this_folder(
    line: str, word: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = refused(line, monkeypatch)
    assert code == 2 and said.startswith(f"error: Nothing stands behind {word}\n  why: An argument is empty")


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
        raise OSError(number, os.strerror(number), str(beside(Path("/a/out"), "partial") / "config.json"))

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


LAST_WORDS = """
import atexit, gc, sys
atexit.register(lambda: print(gc.get_freeze_count() > 10_000))  # after all that follows
from cla_convert.cli import main
main()
"""


@pytest.mark.parametrize(("line", "code"), [("recipes ls", 0), ("verify nothere", 3), ("--nothere", 2)])
def test_nothing_is_looked_through_for_garbage_once_the_work_is_done(line: str, code: int) -> None:
    words = [sys.executable, "-c", LAST_WORDS, *line.split()]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.endswith("True\n") and done.returncode == code, done.stdout + done.stderr


@pytest.mark.parametrize(("line", "closed", "code"), [
    ("recipes ls", ">&-", 0), ("recipes ls", "2>&-", 0), ("verify nothere", "<&- >&- 2>&-", 3),
])  # fmt: skip
def test_streams_may_be_closed(line: str, closed: str, code: int) -> None:
    words = f"{sys.executable} -m cla_convert {line} {closed}"
    done = subprocess.run(words, shell=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


def test_a_reader_that_has_gone_is_no_bug() -> None:
    words = [sys.executable, "-m", "cla_convert", "recipes", "reference"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&1 >/dev/null | true"])
def test_an_error_that_nobody_can_read_is_none_of_its_own(stderr: str) -> None:
    words = f"set -o pipefail; {sys.executable} -m cla_convert verify nothere {stderr}"
    assert subprocess.run(["bash", "-c", words], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 3


def test_a_signal_is_no_failure_of_what_is_called_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that is interrupted does not refuse the conversation, which would be left out for good."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    render = tokenizer.apply_chat_template

    def interrupted(*turns: Any, **settings: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return render(*turns, **settings)

    tokenizer.apply_chat_template = interrupted
    monkeypatch.setattr(cli, "_heard", None)
    before = {number: signal.signal(number, cli._interrupt) for number in stop_signals()}
    try:
        with pytest.raises(Stopped):
            Conversations(tokenizer, "chats").text([{"role": "user", "content": "Hello"}], "row 1")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


SECOND = """
import signal, time
from cla_convert import cli, errors
signal.signal(signal.SIGTERM, cli._interrupt)
try:
    signal.raise_signal(signal.SIGTERM)
except errors.Stopped:
    signal.raise_signal(signal.SIGTERM)
    print("an echo", flush=True)
    time.sleep(cli.ECHO + 0.1)
    signal.raise_signal(signal.SIGTERM)
    print("not here", flush=True)
"""


def test_a_second_signal_ends_it_at_once_but_its_echo_does_not() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.returncode) == ("an echo\n", -signal.SIGTERM), done.stderr


STOPPED = """
import atexit, signal, sys
atexit.register(lambda: signal.raise_signal(signal.SIGINT))
from cla_convert.cli import main
main()
"""


def test_ctrl_c_while_python_ends_shows_no_traceback() -> None:
    words = [sys.executable, "-c", STOPPED, "verify", "nothere"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    assert done.returncode == -signal.SIGINT


def test_a_closed_terminal_stops_it_unless_nohup_says_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    try:
        assert signal.SIGHUP in stop_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert stop_signals() == [signal.SIGINT, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_folder_that_has_been_removed_is_no_place_to_be_in(tmp_path: Path) -> None:
    words = f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} -m cla_convert convert source out"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, shell=True, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 3 and "error: The folder that you are in is gone" in done.stderr, done.stderr
    for asked in ("-h", "--version"):
        line = words.replace("convert source out", asked)
        assert subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, env=environment).returncode == 0


def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    words = [sys.executable.encode(), b"-m", b"cla_convert", b"convert", b"source", b"l\xe9"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "It is no UTF-8" in done.stderr, done.stderr
    check_words(["chat", "model", "--system=\udce9", "--system", "\udce9"])


@pytest.mark.parametrize("line", [
    "inspect ~nobody-of-that-name/x", "uptrain converted out --tokens 1M --set data.sources=[{path:~nobody-here/x}]",
])  # fmt: skip
def test_a_home_that_there_is_not_is_a_name_like_any_other(
    line: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = refused(line.replace("path:", "path: "), monkeypatch)
    assert code in (2, 3) and "~nobody" in said


def test_a_cache_without_a_home_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLA_CONVERT_CACHE", "~nobody-of-that-name/cache")
    code, said = refused("cache ls", monkeypatch)
    assert code == 3 and "Let CLA_CONVERT_CACHE name a folder" in said


def test_a_link_that_leads_nowhere_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="link is a link that leads nowhere"):
        check_place(tmp_path / "link")


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


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_help_fits_the_terminal_and_shows_what_is_needed(columns: int, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.main import get_command

    for name in dict(every_command(get_command(app))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", str(columns))
            app([*name.split(), "--help"], prog_name="cla-convert", standalone_mode=False)
        *lines, example = capsys.readouterr().out.rstrip().split("\n")
        assert max(map(len, lines)) <= columns, name
        assert example.startswith("  Example: cla-convert "), f"{name}: the example is broken"
    assert get_usage("run") == "run [OPTIONS] RECIPE --out DIR"
    assert get_usage("report") == "report [OPTIONS] RUN_DIR..."
    assert get_usage("recipes cp") == "recipes cp [OPTIONS] NAME [FILE]"


def get_usage(name: str) -> str:
    from typer.main import get_command

    command: Any = dict(every_command(get_command(app)))[name]
    context = command.make_context(name, ["--help"], resilient_parsing=True)
    return " ".join([name, *command.collect_usage_pieces(context)])


def test_inspect_counts_a_small_model_in_thousands(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["inspect", "source"], standalone_mode=False)
    assert capsys.readouterr().out.startswith("source: llama, 64k parameters in float32\n")


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_a_recipe_may_come_through_a_pipe_and_its_mistakes_have_lines(name: str, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "cla_convert", "run", name, "--out", str(tmp_path / "run")]
    recipe = "train:\n  tokens: 1k\n  tokns: 2k\n"
    done = subprocess.run(run, input=recipe, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "/dev/stdin:3: unknown key 'train.tokns'. Did you mean 'tokens'?" in done.stderr


def test_what_comes_next_can_be_copied_whatever_the_model_is_called(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = shutil.copytree(models / "source", tmp_path / "mein Mödel")
    app(["inspect", str(named)], standalone_mode=False)
    assert capsys.readouterr().out.endswith(f"next        cla-convert convert '{named}' OUT\n")


@pytest.mark.parametrize(
    ("line", "resumes"),
    [("convert a b --overwrite", "convert a b --overwrite"), ("-q convert a --overwrite", "-q convert a --overwrite"),
     ("run convert --out b --overwrite", "run convert --out b"), ("uptrain a b --no-resume", "uptrain a b")],
)  # fmt: skip
def test_the_line_that_resumes_does_not_start_over(line: str, resumes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cla-convert", *line.split()])
    assert command_line() == f"cla-convert {resumes}"


def test_a_gate_without_results_says_which_command_makes_them(models: Path, tmp_path: Path) -> None:
    run = shutil.copytree(models / "begun", tmp_path / "run")
    (run / "plan.json").write_text(json.dumps({"kv_source_layers": [0]}))
    with pytest.raises(ClaError) as caught:
        app(["report", str(run), "--gate"], standalone_mode=False)
    assert caught.value.exit_code == 4 and "not been evaluated" in str(caught.value)
    assert "Uptrain longer" not in str(caught.value) and "cla-convert run" in caught.value.fix


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(
    "line",
    ["convert source {run}/converted --overwrite --init mean", "convert source {run}/new --init mean",
     "uptrain converted {run}/other --tokens 26M --teacher source -q",
     "uptrain converted {run}/control/uptrained --tokens 26M --teacher source -q",
     "eval source --tasks piqa --limit 1 --out {run}/eval/before",
     "eval source --tasks piqa --limit 1 --out {run}"],
)  # fmt: skip
def test_nothing_is_written_into_a_run_that_another_process_is_at_work_in(
    line: str, begun: bool, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it has read its text, nothing but the lock of an empty folder tells that it is one."""
    run = RunFolder(tmp_path / "run")
    if begun:
        run.save_recipe(Recipe())
        shutil.copytree(models / "converted", run.converted)
        (run.converted / "cla_manifest.json").write_text("{}")
    before = sorted(run.path.rglob("*"))
    with run.alone():
        code, said = refused(line.format(run=run.path), monkeypatch)
        assert sorted(run.path.rglob("*")) == before
    assert code == 3 and f"Another process is at work in {run.path}\n  fix: Wait for it" in said, said


def test_a_lock_is_a_runs_only_on_a_folder_that_is_empty_and_two_may_ask_at_once(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.touch()
    asking = os.open(folder, os.O_RDONLY)
    lock(asking, shared=True)
    check_free(folder)
    os.close(asking)
    check_free(file)
    with alone_in(folder), pytest.raises(ClaError, match="at work"):
        check_free(folder)
    folder.mkdir(exist_ok=True)
    (folder / "other").touch()
    with alone_in(folder):  # as by `flock DIR COMMAND`
        check_free(folder)


def test_a_model_that_was_moved_and_left_a_link_is_still_of_its_run(tmp_path: Path) -> None:
    run, elsewhere = RunFolder(tmp_path / "run"), tmp_path / "disk" / "model"
    run.save_recipe(Recipe())
    elsewhere.mkdir(parents=True)
    run.converted.symlink_to(elsewhere)
    with run.alone(), pytest.raises(ClaError, match="Another process is at work"), alone_around(run.converted):
        pass
    assert RunFolder.around(elsewhere) is None


def test_a_path_that_leaves_a_run_again_is_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "run")
    run.save_recipe(Recipe())
    (tmp_path / "other").mkdir()
    assert RunFolder.around(run.path / ".." / "other") is None
    monkeypatch.chdir(run.path)
    assert RunFolder.around(Path("../other")) is None and RunFolder.around(Path("eval")) is not None


def test_texts_are_named_as_their_files_are():
    paths = ["law.txt", "a/law.txt", "held_out.txt", "./piqa.txt", "b/law.md", "Zwei Wörter.txt", "..."]
    names = [text["name"] for text in texts_in(paths, ["held_out", "piqa"])]
    assert names == ["law", "law-2", "held_out-2", "piqa-2", "law-3", "Zwei-Wörter", "text"]


@pytest.mark.parametrize("place", [".", "./", "./~here"])
def test_a_cache_in_the_folder_that_one_is_in(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLA_CONVERT_CACHE", place)
    assert cache_folder() == Path(place)
