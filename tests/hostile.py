"""Broken and hostile files, made by the thousand, and the command line run on each.

    python -m tests.hostile CASES [SEED [NUMBER]] [KIND]

Every case is a process of its own (forked from this one, which has imported everything), with 1 GB of memory beyond
what it starts with, 10 s of processor time, and the files of a tiny model or run in which something was changed.
Whatever was changed: the exit code is one that docs/cli.md names, there is no traceback, nothing half-written stays
behind and the source is as it was.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ALLOWED = {0, 2, 3, 4}
OUT_OF_MEMORY = ("MemoryError", "can't allocate memory", "not enough memory", "Cannot allocate memory")
MEMORY, SECONDS = 1_000_000_000, 10
Case = Callable[[random.Random, Path, Path], list[object]]
"""Changes files in the first folder (a copy of all inputs) and returns a command line that writes to the second."""

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**9, 10**30, -(2**63), 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "0", "6", "\ud800", "\x00", "é" * 50, "a" * 10_000, "../../etc/passwd", "/etc/passwd",
    "<script>alert(1)</script>", "{{ 7 * 7 }}", "|`\n# x\n---\n", [], {}, [[]], [None], [0, 1, 2], ["x"], [{}],
    {"x": {"y": [1]}}, {"a": None}, [10**9], [-1, 2**70], list(range(2000)),
]  # fmt: skip
TEXTS = [
    b"", b" ", b"null", b"[]", b"{}", b"3", b'"x"', b"{", b'{"a": 1,}', b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}",
    b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5_000, b'{"a": ' + b"9" * 5_000 + b"}", b'{"a": "\\ud800"}', b"\x00" * 64,
    b"a: &a [x, x]\nb: &b [*a, *a, *a, *a]\n", b"- 1\n- 2\n", b"!!python/object/apply:os.system ['touch pwned']\n",
    b"<<: {a: 1}\n", b"? [a]\n: b\n", b"a: 2024-99-99\n", b"\tx: 1\n", b"a: !!binary x\n", b"%YAML 9.9\n---\n",
    b"a0: &a0 [x]\n" + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 30)),
]  # fmt: skip


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON tree with every key in it."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from places(value)


def changed(rng: random.Random, tree: Any) -> Any:
    """The tree with one to three things changed: a value, a key, a type, something missing, something twice."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(tree))
        if not found:
            return rng.choice(VALUES)
        shallow = [place for place in found if place[0] is tree]
        inside, key = rng.choice(shallow if rng.random() < 0.5 else found)
        match rng.randrange(6):
            case 0:
                del inside[key]
            case 1 if isinstance(inside, dict):
                inside[str(rng.choice(VALUES))[:100]] = inside.pop(key)
            case 2:
                inside[key] = [inside[key]] * rng.choice((1, 2, 1000))
            case 3:
                other, name = rng.choice(found)
                present = name in other if isinstance(other, dict) else name < len(other)
                inside[key] = json.loads(json.dumps(other[name])) if present else None
            case _:
                inside[key] = rng.choice(VALUES)
        tree = json.loads(json.dumps(tree))  # no part twice, and no part in itself
    return tree


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Bytes with some flipped, cut off, doubled or put in; or other bytes altogether."""
    if not content or rng.random() < 0.3:
        return rng.choice(TEXTS)
    at = rng.randrange(len(content))
    match rng.randrange(4):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + rng.randbytes(rng.choice((1, 8, 1000))) + content[at:]
        case 2:
            return content + content[at:]
        case _:
            flipped = bytearray(content)
            for _ in range(rng.choice((1, 4, 32))):
                flipped[rng.randrange(len(flipped))] = rng.randrange(256)
            return bytes(flipped)


def spoil(rng: random.Random, path: Path) -> None:
    """Change a JSON, JSONL or YAML file: mostly what it says, sometimes its bytes."""
    content = path.read_bytes()
    if rng.random() < 0.25:
        path.write_bytes(damaged(rng, content))
    elif path.suffix == ".jsonl":
        lines = [line for line in content.decode().splitlines() if line.endswith("}")]
        lines[rng.randrange(len(lines))] = json.dumps(changed(rng, json.loads(rng.choice(lines))))
        path.write_text("\n".join(lines))
    else:
        import yaml

        tree = changed(rng, yaml.safe_load(content))
        path.write_text(json.dumps(tree))  # YAML, too


def spoil_header(rng: random.Random, path: Path) -> None:
    """Change the header of a safetensors file, with or without its length."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.2:
        path.write_bytes(damaged(rng, content[: 8 + length]) + (rest if rng.random() < 0.5 else b""))
        return
    if rng.random() < 0.8:
        header = json.dumps(changed(rng, json.loads(header))).encode()
    else:
        header = damaged(rng, header)
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**63, len(header) + 1))
    path.write_bytes(length.to_bytes(8, "little") + header + rest)


def spoil_gguf(rng: random.Random, path: Path) -> None:
    """Change bytes where the header is: counts, lengths, types, names."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.choice((rng.randrange(24), rng.randrange(600), rng.randrange(len(content))))
        size = rng.choice((1, 4, 8))
        value = rng.choice((0, 1, 8, 9, 255, 2**31 - 1, 10**9, 2**62, 2**64 - 1, rng.randrange(2**64)))
        content[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    if rng.random() < 0.1:
        del content[rng.randrange(len(content)) :]
    path.write_bytes(content)


def on_model(rng: random.Random, model: Path, out: Path) -> list[object]:
    """A verb that reads a model."""
    convert = ["convert", model, out / "out", "--init", rng.choice(("mean", "first")), "--sharing", "cla2"]
    return rng.choice((["inspect", model], ["inspect", model, "--json"], convert, [*convert, "--dry-run"], convert))


def config(rng: random.Random, given: Path, out: Path) -> list[object]:
    model = given / rng.choice(("llama", "qwen2", "gemma3", "phi3"))
    spoil(rng, model / "config.json")
    return on_model(rng, model, out)


def index(rng: random.Random, given: Path, out: Path) -> list[object]:
    spoil(rng, given / "sharded" / "model.safetensors.index.json")
    return on_model(rng, given / "sharded", out)


def header(rng: random.Random, given: Path, out: Path) -> list[object]:
    model = given / rng.choice(("llama", "phi3", "sharded"))
    spoil_header(rng, rng.choice(sorted(model.glob("*.safetensors"))))
    return on_model(rng, model, out)


def sidecar(rng: random.Random, given: Path, out: Path) -> list[object]:
    model = given / "llama"
    spoil(
        rng,
        rng.choice([model / name for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")]),
    )
    return on_model(rng, model, out)


def gguf(rng: random.Random, given: Path, out: Path) -> list[object]:
    spoil_gguf(rng, given / "tiny.gguf")
    return on_model(rng, given / "tiny.gguf", out)


def recipe(rng: random.Random, given: Path, out: Path) -> list[object]:
    spoil(rng, given / "recipe.yaml")
    convert = [
        "convert",
        given / "llama",
        out / "out",
        "--recipe",
        given / "recipe.yaml",
        "--dry-run",
        "--init",
        "mean",
    ]
    return rng.choice((convert, ["run", given / "recipe.yaml", "--out", out / "run", "--until", "plan"]))


def run_folder(rng: random.Random, given: Path, out: Path) -> list[object]:
    run = given / "run"
    files = [path for path in sorted(run.rglob("*")) if path.suffix in (".json", ".jsonl", ".yaml")]
    spoil(rng, rng.choice(files))
    return ["report", run, *rng.choice(([], ["--gate"], ["--json"], [given / "other"]))]


def resumed(rng: random.Random, given: Path, out: Path) -> list[object]:
    run = given / "begun"
    file = rng.choice(("recipe.yaml", "environment.json", "plan.json", "convert.json", "converted/config.json"))
    spoil(rng, run / file)
    return ["run", given / "recipe.yaml", "--out", run, "--until", "convert"]


def output(rng: random.Random, given: Path, out: Path) -> list[object]:
    """A converted model that is inspected, or trained on: the files that this tool wrote."""
    model = given / "begun" / "converted"
    spoil(rng, model / rng.choice(("cla_manifest.json", "config.json")))
    return ["inspect", model]


def own_task(rng: random.Random, given: Path, out: Path) -> list[object]:
    """A task of the user's own."""
    spoil(rng, given / "tasks" / "sums.yaml")
    return ["eval", given / "llama", "--include-path", given / "tasks", "--tasks", "sums", "--out", out / "eval"]


KINDS: list[Case] = [config, index, header, sidecar, gguf, recipe, run_folder, resumed, output, own_task]
WEIGHTS = [27, 12, 18, 9, 16, 8, 6, 2, 2, 4]


def inputs(folder: Path) -> Path:
    """One of each: models, a sharded one, a GGUF file, a recipe, a finished run and one that was begun, a task."""
    from cla_convert.files import write_json

    from .conftest import save_tiny_llama
    from .tiny import save_tiny
    from .unit.run_files import add_everything, write_run
    from .unit.test_gguf import write_gguf

    for case in ("qwen2", "gemma3", "phi3"):
        save_tiny(case, folder / case)
    save_tiny_llama(folder / "llama")
    save_tiny_llama(folder / "sharded", max_shard_size="40KB")
    write_gguf(folder / "tiny.gguf", "llama")
    for name in ("run", "other"):
        add_everything(write_run(folder / name))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "base.yaml").write_text("custom_dataset: !function rows.rows\ntest_split: test\n")
    (folder / "tasks" / "rows.py").write_text(
        "from cla_convert.evaluation.tasks.pack import Rows\n\n"
        "def rows(**_): return {'test': Rows([{'question': 'One and one?', 'right': 'two', 'wrong': 'one'}])}\n"
    )
    write_json(folder / "tasks" / "sums.yaml", {
        "include": "base.yaml", "task": "sums", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{[right, wrong]}}", "doc_to_target": 0, "num_fewshot": 0, "description": "Add. ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    })  # fmt: skip
    (folder / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"line {i} of the text " * 20}) for i in range(40))
    )
    write_json(folder / "recipe.yaml", {
        "source": {"model": str(folder / "llama")}, "convert": {"sharing": "cla2", "init": "mean"},
        "data": {"sources": [{"path": str(folder / "text.jsonl")}], "held_out": 0.1},
        "train": {"tokens": 0, "sequence_length": 64, "batch_tokens": 256},
        "eval": {"tasks": ["openbookqa"], "limit": 2},
        "seed": 1, "device": "cpu",
    })  # fmt: skip
    return folder


def state_of(folder: Path) -> str:
    """A hash of all that is in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)}\0".encode(errors="surrogateescape"))
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def half_written(out: Path) -> list[str]:
    """What should not lie in a folder after a run that failed or succeeded: staging, temporaries, parts of a model."""
    staging = (".partial", ".old-", ".tmp")
    found = [path for path in out.rglob("*") if any(part in path.name for part in staging)]
    models = [path.parent for path in out.rglob("model.safetensors") if "sources" not in path.parts]
    found += [model for model in models if not (model / "cla_manifest.json").exists()]
    return [str(path.relative_to(out)) for path in found]


def judged(number: int, seed: int, kind: Case, pristine: Path, work: Path) -> str | None:
    """Run one case; what is wrong with how it ended, if anything."""
    rng = random.Random(f"{seed} {number}")
    given, out = work / "given", work / "out"
    for folder in (given, out):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, given)
    out.mkdir()
    line = [str(word) for word in kind(rng, given, out)]
    before = None if line[0] in ("report", "run") else state_of(given)
    code, seconds, log = run_limited(["cla-convert", *line], work)
    wrong = [
        f"exit {code}" if code not in ALLOWED else "",
        "memory" if any(word in log for word in OUT_OF_MEMORY) else "",
        "traceback" if "Traceback (most recent call last)" in log else "",
        f"{seconds:.1f} s" if seconds > SECONDS else "",
        f"left {left}" if (left := half_written(out)) else "",
        "changed its source" if before and state_of(given) != before else "",
        "ran code" if (work / "pwned").exists() else "",
    ]
    if not any(wrong):
        return None
    return f"case {number} ({kind.__name__}), {', '.join(filter(None, wrong))}: {' '.join(line)[:300]}\n{log[-3000:]}"


def run_limited(line: list[str], work: Path) -> tuple[int, float, str]:
    """Exit code, seconds of processor time and output of a command line, in a process of its own."""
    log = work / "log"
    pid = os.fork()
    if pid == 0:
        try:
            _run(line, log, work)
        finally:
            os._exit(99)  # never reached: _run leaves by os._exit
    deadline = time.monotonic() + 12 * SECONDS
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, log.read_text(errors="replace")


def _run(line: list[str], log: Path, work: Path) -> None:
    import traceback

    from cla_convert.cli import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(work)
    os.environ["CLA_CONVERT_CACHE"] = str(work / "out" / "cache")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS))
    sys.argv = line
    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def find(cases: int, seed: int = 0, only: str = "", one: int | None = None) -> list[str]:
    """What is wrong with how so many cases ended, one text each."""
    import scipy.stats  # noqa: F401
    import torch

    import cla_convert.cli
    import cla_convert.conversion.convert
    import cla_convert.conversion.inspect
    import cla_convert.pipeline
    import cla_convert.report.report  # noqa: F401

    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        pristine = inputs(Path(scratch) / "pristine")
        work = Path(scratch) / "work"
        work.mkdir()
        line = ["run", pristine / "recipe.yaml", "--out", pristine / "begun", "--until", "convert"]
        assert run_limited(["cla-convert", *map(str, line)], work)[0] == 0, (work / "log").read_text()
        for number in range(cases) if one is None else [one]:
            kind = random.Random(f"{seed} {number} kind").choices(KINDS, WEIGHTS)[0]
            if number and number % 100 == 0:
                print(f"{number} cases, {len(found)} faults so far", file=sys.stderr, flush=True)
            if only and kind.__name__ != only:
                continue
            if wrong := judged(number, seed, kind, pristine, work):
                found.append(wrong)
                print(wrong, flush=True)
    return found


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdecimal()]
    names = [word for word in sys.argv[1:] if not word.isdecimal()]
    faults = find(numbers[0], *numbers[1:2], only=names[0] if names else "", one=numbers[2] if numbers[2:] else None)
    print(f"{numbers[0]} cases, {len(faults)} faults")
    sys.exit(bool(faults))
