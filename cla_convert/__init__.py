"""cla-convert: give a pretrained MQA/GQA model Cross-Layer Attention (arXiv 2405.12981) and prove what it cost.

The stages as Python functions, see docs/python-api.md; each is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .errors import ClaError
    from .pipeline import run
    from .recipe import Recipe
    from .recipe_file import load_recipe
    from .run_folder import RunFolder
    from .stages.check import check
    from .stages.convert import convert
    from .stages.evaluate import evaluate
    from .stages.plan import plan
    from .stages.report import write_report
    from .stages.uptrain import uptrain

__all__ = [
    "ClaError",
    "Recipe",
    "RunFolder",
    "__version__",
    "check",
    "convert",
    "evaluate",
    "load_recipe",
    "plan",
    "run",
    "uptrain",
    "write_report",
]  # fmt: skip

_PLACES = {
    "ClaError": "errors", "Recipe": "recipe", "RunFolder": "run_folder", "check": "stages.check",
    "convert": "stages.convert", "evaluate": "stages.evaluate", "load_recipe": "recipe_file", "plan": "stages.plan",
    "run": "pipeline", "uptrain": "stages.uptrain", "write_report": "stages.report",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
