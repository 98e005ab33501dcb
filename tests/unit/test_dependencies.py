"""What pyproject.toml asks for is used: every dependency is imported somewhere."""

import ast
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imported() -> set[str]:
    names: set[str] = set()
    for path in (ROOT / "cla_convert").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").partition(".")[0])
    return names


def test_every_dependency_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["convert"]]
    names = {entry.partition(">=")[0].partition("[")[0].lower() for entry in asked}
    modules = packages_distributions()
    used = {found.lower().replace("_", "-") for module in imported() for found in modules.get(module, [module])}
    assert names - used == set()
