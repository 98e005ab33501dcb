"""The house: no import circle, no import upwards, one place for the layout of a run."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import cla_convert
from cla_convert.console import VERBS, command
from cla_convert.run_folder import PICTURES, RunFolder

ROOT = Path(cla_convert.__file__).parent
FILES = [path for path in sorted(ROOT.rglob("*.py")) if not {"templates", "generated"} & set(path.parts)]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(module: str) -> Iterator[str]:
    """Modules of this package that a module imports, at its top, within functions and for types only."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [node.module])])
        for alias in node.names:
            named = f"{base}.{alias.name}"
            found = named if named in MODULES else base
            if found in MODULES and found != module:
                yield found


def circles() -> list[list[str]]:
    """Strongly connected modules, found by reachability."""
    graph = {module: set(imports(module)) for module in MODULES}
    reach: dict[str, set[str]] = {}
    for module in MODULES:
        seen: set[str] = set()
        waiting = list(graph[module])
        while waiting:
            if (one := waiting.pop()) not in seen:
                seen.add(one)
                waiting.extend(graph[one])
        reach[module] = seen
    return [[module, *sorted(o for o in reach[module] if module in reach[o] and o != module)]
            for module in MODULES if module in reach[module]]  # fmt: skip


LAYERS = [
    "cli", "pipeline", "stages", "same_recipe", "record", "bench", "report", "conversion", "training", "evaluation",
    "chat", "transformers_cli", "preflight", "documents", "conversations", "run_folder", "results", "serving", "models",
    "recipes", "recipe_file", "recipe_mistakes", "recipe_places", "recipe", "removed", "named", "registry", "effort",
    "kept", "environment", "files", "staging", "yaml_text", "refusals", "surrogates", "console", "bars", "tables",
    "amounts", "errors",
]  # fmt: skip
"""From top to bottom, as in CONTRIBUTING.md."""
_BESIDE = ("", ".__main__", ".version")


def test_no_import_goes_in_a_circle() -> None:
    assert circles() == []


def test_imports_go_down() -> None:
    rank = {name: number for number, name in enumerate(LAYERS)}

    def layer(module: str) -> int:
        return rank.get(module.partition(".")[2].partition(".")[0], len(LAYERS))

    known = [module for module in MODULES if module.partition(".")[2].partition(".")[0] in rank]
    assert {module for module in MODULES if module not in known} <= {f"cla_convert{one}" for one in _BESIDE}
    assert [
        f"{module} -> {other}" for module in known for other in imports(module) if layer(other) < layer(module)
    ] == []


def test_only_the_run_folder_knows_its_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    point, training = folder.evaluation.point("before"), folder.training
    paths = [folder.recipe, folder.environment.path, folder.plan.path, folder.convert.path, folder.report, folder.bench]
    paths += [folder.bench_page, *folder.pages.values(), training.metrics, training.result.path, training.wandb_id]
    paths += [folder.evaluation.batch_size, folder.evaluation.comparison, point.results.path, point.kv_cache.path]
    names = "|".join(re.escape(path.name) for path in paths)
    folders = "converted|uptrained|checkpoints|control|eval|tensorboard|tasks|perplexity"
    joined = re.compile(rf"""["'/]({names})["']|/ ["']({folders})["']|["'](held_out|agreement|domains)\.json["']""")
    found = {
        f"{name}: {match[0]}"
        for name, path in MODULES.items()
        if name != "cla_convert.run_folder"
        for match in joined.finditer(re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL))
    }
    assert found == set()


def test_clear_removes_all_that_a_run_leaves_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    point = folder.evaluation.point("before")
    files = [folder.recipe, folder.environment.path, folder.plan.path, folder.convert.path, folder.report, folder.bench]
    files += [folder.bench_page, *folder.pages.values(), *map(folder.picture, PICTURES)]
    files += [folder.converted / "config.json", folder.evaluation.comparison, point.task("a/b")]
    for training in (folder.training, folder.control):
        files += [training.metrics, training.result.path, training.wandb_id, training.tensorboard / "x"]
        files += [training.model / "config.json", training.checkpoints / "step-1" / "state.json"]
    files.append(tmp_path / "wandb" / "x")
    for file in [*files, tmp_path / "notes.md"]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    folder.clear()
    assert [path.name for path in tmp_path.rglob("*")] == ["notes.md"]


def test_what_uptrain_keeps_lies_beside_its_output_or_in_the_run_that_this_is_of(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    student = tmp_path / "student"
    alone = RunFolder.of_uptraining(student, tmp_path / "out")
    assert (alone.training.path, alone.training.model) == (tmp_path / "out.state", tmp_path / "out")
    assert alone.converted == student and not alone.converts
    assert RunFolder.of_uptraining(student, run.training.model).path == run.path / "uptrained.state"
    for file in (run.recipe, run.environment.path):
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    for training in (run.training, run.control):
        found = RunFolder.of_uptraining(student, training.model)
        assert (found.path, found.training, found.converted) == (run.path, training, student) and found.converts
    assert RunFolder.of_uptraining(student, run.path / "other").path == run.path / "other.state"


def test_a_command_to_be_copied_is_quoted() -> None:
    """`console.command` does that; a path in a line of one's own would fall apart at its first blank."""
    unquoted = re.compile(rf"cla-convert (?:{VERBS}) [^\"`]*{{(?!_)")
    lines = [(path.name, line) for path in FILES for line in path.read_text(encoding="utf-8").split("\n")]
    assert not [(name, line.strip()) for name, line in lines if "{" in line and unquoted.search(line)]
    assert command("convert", Path("a b"), "OUT") == "cla-convert convert 'a b' OUT"
