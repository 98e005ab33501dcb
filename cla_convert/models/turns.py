"""Turns of a conversation, put together by a model's own chat template."""

from collections.abc import Mapping, Sequence
from datetime import datetime, tzinfo
from typing import Any
from unittest.mock import patch

Turns = Sequence[Mapping[str, Any]]
"""{role: system, user or assistant, content}."""


class _Day(datetime):
    """The day that templates are told: the one that Llama's name where they are told none."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "_Day":
        return cls(2024, 7, 26, tzinfo=tz)


def written(tokenizer: Any, turns: Turns, **settings: Any) -> tuple[str, bool]:
    """The text of a conversation, and whether its system turn was left out because the template takes none.

    A template that names the day always names the same one: the same turns are the same text tomorrow.

    Raises whatever the template does, which is a program of the model's.
    """
    try:
        return _render(tokenizer, turns, settings), False
    except Exception:
        others = [turn for turn in turns if turn["role"] != "system"]
        if len(others) == len(turns):
            raise
    return _render(tokenizer, others, settings), True


def _render(tokenizer: Any, turns: Turns, settings: Mapping[str, Any]) -> str:
    from transformers.utils import chat_template_utils

    with patch.object(chat_template_utils, "datetime", _Day, create=True):  # that a later release lacks: not held
        text = tokenizer.apply_chat_template([dict(turn) for turn in turns], tokenize=False, **settings)
    if not isinstance(text, str):
        raise TypeError(f"it gives {type(text).__name__} and no text")
    return text
