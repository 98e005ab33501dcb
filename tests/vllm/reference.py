"""What transformers answers: the tokens that a server has to give."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cla_convert.models.export import register


def greedy(
    model: Any, prompts: list[list[int]], new: int = 16, *, use_cache: bool = True
) -> list[dict[str, list[Any]]]:
    """Tokens and their log-probabilities, one prompt at a time. `model` is loaded or a folder."""
    if isinstance(model, Path):
        register()
        # sdpa would leave out Gemma 2's soft cap
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None,
                output_logits=True, use_cache=use_cache, return_dict_in_generate=True, pad_token_id=0,
            )  # fmt: skip
        tokens = found.sequences[0, len(prompt) :].tolist()
        logprobs = [float(row[0].log_softmax(-1)[token]) for row, token in zip(found.logits, tokens, strict=True)]
        answers.append({"tokens": tokens, "logprobs": logprobs})
    return answers
