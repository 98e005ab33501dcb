"""Numbers in a config.json that no model can have, refused where it is opened. Imports no torch.

transformers takes them, and what they lead to is told much later, of something else: no JSON holds NaN, so the output's
config.json has null there, with which its tokenizer cannot be loaded.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError

_READ = re.compile(r"[^.]*|(text_config\.|vision_config\.|rope_[a-z]*\.).*")
"""Names of what models read; other sections are notes of those who made them, and of other libraries."""
_NOT_NEGATIVE = re.compile(r"(.*_)?(eps|epsilon|theta|max_position_embeddings)")


def refuse_numbers(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError for a number that is not finite, or what is no number or negative where neither can be."""
    for name, value in filter(lambda pair: _READ.fullmatch(pair[0]), _values(config)):
        number = type(value) in (int, float)
        if isinstance(value, float) and not math.isfinite(value):
            wanted = "a finite number"
        elif _NOT_NEGATIVE.fullmatch(name.rpartition(".")[2]) and not (value is None or (number and value >= 0)):
            wanted = "a number, and not below 0"
        else:
            continue
        raise InputError(
            f"{name} is {value!r} in config.json of {folder}",
            why=f"It must be {wanted}.",
            fix="Mend config.json, or take it from where the weights come from.",
        )


def _values(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All that are in no list or section themselves, by dotted names."""
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{name}.{key}", one) for key, one in value.items()]
        elif isinstance(value, list):
            waiting += [(name, one) for one in value]
        else:
            yield name, value
