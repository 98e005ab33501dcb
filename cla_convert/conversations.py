"""Conversations of a data set, as token ids by the chat template of the model that is to follow them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .console import warn
from .errors import InputError
from .models.turns import written
from .surrogates import replaced

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
"""ShareGPT's names of roles, and those of transformers' templates."""

_SAID: set[str] = set()
"""Sources of which something was left out: said once, however often one is read."""


class Conversations:
    """Puts turns into a model's chat template. What the template refuses is left out, and said once."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        """Raises InputError if the tokenizer has no chat template."""
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"{name} is to be read as conversations, and the model has no chat template",
                "Nothing says how this model marks turns: it is a base model, or its template is missing.",
                "Leave `messages_field` out, or take the model's instruct variant.",
            )
        self._tokenizer, self._name = tokenizer, name

    def text(self, turns: Any, where: str) -> str:
        """A whole conversation as the template writes it; empty where the template does not take it.

        Raises:
            InputError: these are no turns.
        """
        try:
            return replaced(written(self._tokenizer, _messages(turns, where))[0], f"text of {self._name}")
        except InputError:
            raise
        except Exception:  # a template is a program of the model's
            _say(self._name, where)
            return ""

    def ids(self, text: str) -> np.ndarray:
        """Its token ids, int64 [n]: the template has put everything around it that belongs there."""
        return np.asarray(self._tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int64)


def _say(name: str, where: str) -> None:
    if name not in _SAID:
        _SAID.add(name)
        warn(f"{name}: conversations that the chat template does not take are left out; the first: {where}")


def _messages(turns: Any, where: str) -> list[dict[str, Any]]:
    """Turns as templates want them: {role, content}.

    Raises:
        InputError: these are no turns.
        ValueError: they are, and one says nothing, or there is none.
    """
    if not isinstance(turns, Sequence) or not all(isinstance(turn, Mapping) for turn in turns):
        raise _no_turns(where)
    found = [(turn.get("role", turn.get("from")), _words(turn.get("content", turn.get("value")))) for turn in turns]
    if not all(isinstance(role, str) for role, _ in found):
        raise _no_turns(where)
    if not found or any(words is None for _, words in found):
        raise ValueError("a turn without words")
    return [{"role": _ROLES.get(role, role), "content": words} for role, words in found]


def _no_turns(where: str) -> InputError:
    return InputError(
        f"{where} holds no conversation",
        "A conversation is a list of turns: {role: user, content: ...}, or {from: human, value: ...}.",
        "Name the column of conversations with `messages_field`.",
    )


def _words(content: Any) -> str | None:
    """What is said in a turn; of several parts, those that are text. None where it is neither."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        return "".join(map(str, parts))
    return content if isinstance(content, str) else None
