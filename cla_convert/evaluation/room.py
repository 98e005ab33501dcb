"""Whether a model's context has room for what tasks ask of it: lm-eval finds out in the middle, at a bare assertion."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..models.export import load_tokenizer
from .context import context_of
from .prepare import Prepared

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATED = 256
"""Tokens that a task generates which does not say how many, in lm-eval."""


def check_answers_fit(tasks: Iterable[Prepared], model_dir: Path, max_length: int) -> None:
    """Raise InputError if an answer of a task, to be scored or generated, is longer than the model is fed."""
    context, tokenizer = context_of(model_dir, max_length), load_tokenizer(model_dir)
    for task in tasks:
        leaves = task.tasks["tasks"].values()
        longest = max((_tokens(one, tokenizer, context) for leaf in leaves for one in leaf.instances), default=0)
        if longest > context:
            raise InputError(
                f"{task.name}: an answer of {longest} tokens does not fit into the context of {context}",
                why="eval.max_length, or what the model was built for, is shorter than an answer of this task.",
                fix="Raise eval.max_length, or leave this task out.",
            )


def _tokens(request: Any, tokenizer: "PreTrainedTokenizerBase", context: int) -> int:
    """What the answer to a request takes; 0 where that is certainly little."""
    if request.request_type == "generate_until":
        from lm_eval.models.utils import normalize_gen_kwargs

        return normalize_gen_kwargs(request.args[1], _GENERATED).get("max_gen_toks", _GENERATED) + 1  # and a prompt
    if request.request_type != "loglikelihood":
        return 0
    prompt, answer = request.args
    if len(answer.encode("utf-8", errors="replace")) + 1 < context:  # no token is less than a byte
        return 0
    start = prompt.rstrip()  # lm-eval counts blanks between both to the answer

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]

    return count(prompt + answer) - count(start)
