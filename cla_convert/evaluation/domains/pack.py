"""The texts of the pack as rows of tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from ..text_files import packed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NAMES = ("encyclopaedia", "web", "news", "law", "science", "dialogue", "code")
WINDOW = 512
"""Tokens of a row."""
ON_CPU = 512
"""Tokens a domain where nothing else is asked for on a CPU: a minute for a 135M model on two cores."""


def domain_rows(
    tokenizer: "PreTrainedTokenizerBase",
    tokens: int | Literal["auto"],
    device: str,
    *,
    first: Sequence[int] = (),
    positions: int | None = None,
) -> dict[str, torch.Tensor]:
    """Rows of token ids [n, WINDOW] of each domain, shorter where the model knows fewer positions or less is asked for.

    Args:
        tokenizer: the source model's.
        tokens: of a domain at most; auto: all there are, on a CPU one row. 0: no domains.
        device: what the models run on.
        first: what every row begins with in place of its own first tokens: what the tokenizer puts in front of a text.
        positions: that the model knows at most.
    """
    limit = (ON_CPU if device == "cpu" else None) if tokens == "auto" else tokens
    if limit == 0:
        return {}
    length = min(WINDOW, positions or WINDOW, limit or WINDOW)
    return {name: _rows(name, tokenizer, length, first)[: limit and limit // length] for name in NAMES}


def documents(name: str) -> list[str]:
    """The texts of a domain."""
    lines = (Path(__file__).parent / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def _rows(name: str, tokenizer: "PreTrainedTokenizerBase", length: int, first: Sequence[int]) -> torch.Tensor:
    """All of a domain, its documents separated by EOS as in training."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(documents(name), add_special_tokens=False, verbose=False).input_ids
    ids = torch.tensor([token for text in encoded for token in [*text, *end]])
    return packed(ids, length, first)
