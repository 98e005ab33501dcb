"""How much of a text a model is fed."""

from typing import Any

CHARACTERS_PER_TOKEN = 4
"""Only for progress bars, which count tokens before a tokenizer has."""


def fed_tokens(config: Any, max_length: int) -> int:
    """The longest context in tokens that a model is fed: `max_length`, or what it was built for if that is less."""
    return min(max_length, getattr(config.get_text_config(), "max_position_embeddings", None) or max_length)
