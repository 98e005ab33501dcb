"""What lm-eval's model classes lack for us: a progress bar of ours, a count of shortened requests, plain refusals."""

from collections.abc import Callable
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from ..errors import InputError
from .chat_template import ChatTemplate, Turns

Base: Any = TemplateLM


class Metered(Base):
    """Put before a model class of lm-eval: `class X(Metered, HFLM)`."""

    context: int
    """Tokens of context and answer that the model is fed at most (the last token of an answer is never fed)."""

    def __init__(self, *arguments: Any, context: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.context = context
        self.on_tokens: Callable[[int], None] = lambda _: None
        self.truncated = 0
        self.in_turns: ChatTemplate | None = None
        """What the requests of a task were prepared with; the model classes have ways of their own."""

    def apply_chat_template(self, chat_history: Turns, add_generation_prompt: bool = True) -> str:
        """The prompt for turns, as it was prepared."""
        assert self.in_turns is not None
        return self.in_turns(chat_history, add_generation_prompt)

    def close(self) -> None:
        """Free what does not go with the object."""

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As the model class, without its bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As the model class, without its bar."""
        self.truncated += sum(map(self._loses_its_start, requests))
        return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As the model class, without its bar."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def truncated_everywhere(self) -> int:
        """Shortened requests, over all processes."""
        return self.truncated

    def _loses_its_start(self, request: Any) -> bool:
        """Whether a prompt leaves no room for all that may be generated after it: lm-eval then shortens it."""
        prompt, options = request.args
        answer = normalize_gen_kwargs(options, self.max_gen_toks).get("max_gen_toks", self.max_gen_toks)
        return len(self.tok_encode(prompt)) > self.max_length - answer

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> Any:
        longest = max(len(target) for _, _, target in requests)
        if longest > self.context:  # lm-eval stops at a bare assertion here
            raise InputError(
                f"An answer of {longest} tokens does not fit into the context of {self.context}",
                why="eval.max_length, or what the model was built for, is shorter than an answer to be scored.",
                fix="Raise eval.max_length, or leave this task out.",
            )
        self.truncated += sum(len(context) + len(target) > self.context + 1 for _, context, target in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)
