"""A model's chat template, with which lm-eval puts its questions into turns of a conversation.

lm-eval's own `apply_chat_template`, but that the day which a template may name is always the same: otherwise two points
of a run that were measured on different days would have been asked different things.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import warn_once
from ..errors import InputError, first_line
from ..models.export import load_tokenizer
from ..models.turns import Turns, written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatTemplate:
    """Renders turns to a prompt; lm-eval calls it as it would its model's `apply_chat_template`."""

    tokenizer: "PreTrainedTokenizerBase"
    arguments: Mapping[str, Any]
    """Further arguments of the template, such as enable_thinking."""

    @classmethod
    def of(cls, model_dir: Path, arguments: Mapping[str, Any]) -> "ChatTemplate":
        """Raises InputError if the model's tokenizer has none."""
        tokenizer = load_tokenizer(model_dir)
        if not tokenizer.chat_template:
            raise InputError(
                "eval.chat_template is true, and the tokenizer has no chat template",
                why=f"Neither tokenizer_config.json nor chat_template.jinja in {model_dir} has one: a base model is "
                "asked plainly.",
                fix="Leave eval.chat_template out, or evaluate the model's instruct variant.",
            )
        return cls(tokenizer, dict(arguments))

    @property
    def identity(self) -> str:
        """Hash of all that prompts depend on beside the turns."""
        parts = [self.tokenizer.chat_template, self.tokenizer.special_tokens_map, self.arguments]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def __call__(self, turns: Turns, add_generation_prompt: bool = True) -> str:
        """The prompt; without a generation prompt the last turn, which is the assistant's, is left open.

        A template that knows no system turn gets none, as in lm-eval.

        Raises:
            InputError: the template refuses the turns, or its arguments.
        """
        try:
            prompt, left_out = written(
                self.tokenizer, turns, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt, **self.arguments,
            )  # fmt: skip
        except Exception as error:  # a template is a program of the model's
            raise _refused(error) from error
        if left_out:
            warn_once("the chat template takes no system turn: what tasks say there (their description) is left out")
        return prompt


def _refused(error: Exception) -> InputError:
    return InputError(
        "The chat template cannot put a task's questions into turns",
        why=f"{type(error).__name__}: {first_line(error)}",
        fix="Leave out the task, eval.num_fewshot or eval.chat_template_args, or set eval.chat_template to false.",
    )
