"""Conversations of a data set, in the chat template of the model that is to follow them."""

from collections.abc import Mapping, Sequence
from typing import Any

from .console import warn_once
from .errors import InputError
from .models.turns import written
from .surrogates import replaced

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
"""ShareGPT's names of roles, and those of transformers' templates."""


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
            left_out = f"{self._name}: conversations that the chat template does not take are left out"
            warn_once(f"{left_out}, such as {where}", about=left_out)
            return ""


def _messages(turns: Any, where: str) -> list[dict[str, Any]]:
    """Turns as templates want them: {role, content}.

    Raises:
        InputError: these are no turns.
        ValueError: they are, and one is not of words alone, or there is none.
    """
    if not isinstance(turns, Sequence) or not all(isinstance(turn, Mapping) for turn in turns):
        raise _no_turns(where)
    roles = [turn.get("role", turn.get("from")) for turn in turns]
    if not all(isinstance(role, str) for role in roles):
        raise _no_turns(where)
    words = [_words(turn) for turn in turns]
    if not turns or None in words:
        raise ValueError("a turn that is not of words alone")
    return [{"role": _ROLES.get(role, role), "content": said} for role, said in zip(roles, words, strict=True)]


def _no_turns(where: str) -> InputError:
    return InputError(
        f"{where} holds no conversation",
        "A conversation is a list of turns: {role: user, content: ...}, or {from: human, value: ...}.",
        "Name the column of conversations with `messages_field`.",
    )


def _words(turn: Mapping[str, Any]) -> str | None:
    """What is said in a turn. None where that is not all of it: it calls a tool, or shows an image."""
    content = turn.get("content", turn.get("value"))
    if turn.get("tool_calls"):
        return None
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        said = [text for text in texts if isinstance(text, str)]
        return "".join(said) if said and len(said) == len(texts) else None
    return content if isinstance(content, str) else None
