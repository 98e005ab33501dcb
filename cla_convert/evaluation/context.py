"""How much of a text a model is fed, and how it goes on."""

from pathlib import Path
from typing import Any

from ..files import read_json
from ..models.checkpoint import Checkpoint

LOGITS = 2**29
"""Of a forward pass on an accelerator at most, where short requests take little longer together: 2 GiB in float32."""
CHARACTERS_PER_TOKEN = 4
"""Only for progress bars, which count tokens before a tokenizer has."""


def fed_tokens(config: Any, max_length: int) -> int:
    """The longest context in tokens that a model is fed: `max_length`, or what it was built for if that is less."""
    return min(max_length, getattr(config.get_text_config(), "max_position_embeddings", None) or max_length)


def context_of(model_dir: Path, max_length: int) -> int:
    """`fed_tokens` of the model in a folder."""
    return min(max_length, Checkpoint.open(model_dir).positions or max_length)


def generation_of(model_dir: Path) -> dict[str, Any] | None:
    """What a model's folder says of how it generates; None where it says nothing."""
    return read_json(model_dir / "generation_config.json")
