"""Whether an evaluation asks for anything. Imports nothing heavy."""

from ..errors import UsageError
from ..recipe import Evaluate
from .tasks import pack


def check_asked(spec: Evaluate) -> None:
    """Raise UsageError where there is neither a task nor a text to evaluate."""
    if not spec.tasks and not spec.perplexity:
        raise UsageError(
            "No tasks to evaluate, and no texts",
            why="eval.tasks and eval.perplexity are both empty.",
            fix=f"Name tasks ({', '.join(pack.names())} ship with the package), or text files in eval.perplexity.",
        )
