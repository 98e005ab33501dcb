"""A few prompts, answered greedily at every point: what the change sounds like.

A score says how much is lost, an answer what it is like. The prompts are those of the recipe, and none that stands in
the training text is asked.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from ..bars import tick
from ..console import say
from ..models.scoring import evaluating
from ..models.turns import written

_CHUNK = 1 << 24
"""Training tokens searched at a time."""


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> dict[str, Any]:
    """Answer every prompt by itself, always with the likeliest token.

    Args:
        model: a causal language model of transformers (plain or CLA).
        tokenizer: with its chat template, if it has one.
        prompts: what is asked.
        new_tokens: of an answer, at most; fewer where the model was built for fewer.

    Returns:
        answers: rows of {prompt, text, cut}; cut: whether it ended because it had to. Prompts that leave no room for an
        answer are left out.
    """
    rows = []
    positions = getattr(model.config, "max_position_embeddings", None)
    with evaluating(model):
        for prompt in prompts:
            tick("rows")
            ids = _asked(tokenizer, prompt).to(model.device)
            room = min(new_tokens, positions - ids.shape[1]) if positions else new_tokens
            if room < 1:
                continue
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False, temperature=None,
                top_p=None, top_k=None, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            )[0, ids.shape[1] :]  # fmt: skip
            text = tokenizer.decode(made, skip_special_tokens=True).strip()
            rows.append({"prompt": prompt, "text": text, "cut": len(made) == room and not _ended(model, made)})
    return {"answers": rows}


def _asked(tokenizer: Any, prompt: str) -> torch.Tensor:
    """Token ids [1, T]: a turn of a conversation, or a question to be continued where there is no chat template."""
    if getattr(tokenizer, "chat_template", None):
        turn: Any = [{"role": "user", "content": prompt}]
        with suppress(Exception):  # a template is a program of the model's, and may refuse a turn like this one
            asked, _ = written(tokenizer, turn, add_generation_prompt=True)
            return tokenizer(asked, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return tokenizer(f"Question: {prompt}\nAnswer:", return_tensors="pt")["input_ids"]


def _ended(model: Any, made: torch.Tensor) -> bool:
    """Whether the model itself ended its answer."""
    ends = model.generation_config.eos_token_id
    return len(made) > 0 and int(made[-1]) in (ends if isinstance(ends, list) else [ends])


def unseen(prompts: Sequence[str], tokenizer: Any, trained: Any) -> list[str]:
    """The prompts that do not stand in the training text, token by token; says which do.

    Args:
        prompts: of the recipe.
        tokenizer: of the model.
        trained: ids of the training text, one after another.
    """
    found = [prompt for prompt in prompts if any(_stands_in(ids, trained) for ids in _numbered(prompt, tokenizer))]
    if found:
        say(f"not asked, because it was trained on: {'; '.join(found)}")
    return [prompt for prompt in prompts if prompt not in found]


def _numbered(prompt: str, tokenizer: Any) -> list[list[int]]:
    """Its tokens at the start of a text, behind a blank and behind the end of a line."""
    texts = (prompt, f" {prompt}", f"\n{prompt}")
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def _stands_in(ids: list[int], text: Any) -> bool:
    """Whether `ids` stand in `text` one after another."""
    if not ids:
        return False
    for start in range(0, len(text) - len(ids) + 1, _CHUNK):
        part = np.asarray(text[start : start + _CHUNK + len(ids) - 1])
        at = np.flatnonzero(part[: len(part) - len(ids) + 1] == ids[0])
        for offset, token in enumerate(ids[1:], 1):
            at = at[part[at + offset] == token]
        if len(at):
            return True
    return False
