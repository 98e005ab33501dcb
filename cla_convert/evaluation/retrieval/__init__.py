"""Passkey retrieval and needle in a haystack: can the model still find one fact anywhere in a long context?

YAMLs that lm-eval runs, over documents that are generated for a tokenizer, a seed and a grid of context lengths and
depths (`documents.py`). Nothing is downloaded.
"""

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the tasks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))
