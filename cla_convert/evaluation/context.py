"""How much of a text a model is fed."""

from pathlib import Path
from typing import Any

from ..models.export import register

CHARACTERS_PER_TOKEN = 4
"""Only for progress bars, which count tokens before a tokenizer has."""


def fed_tokens(config: Any, max_length: int) -> int:
    """The longest context in tokens that a model is fed: `max_length`, or what it was built for if that is less."""
    return min(max_length, getattr(config.get_text_config(), "max_position_embeddings", None) or max_length)


def context_of(model_dir: Path, max_length: int) -> int:
    """`fed_tokens` of the model in a folder."""
    from transformers import AutoConfig

    register()
    return fed_tokens(AutoConfig.from_pretrained(model_dir, trust_remote_code=False), max_length)
