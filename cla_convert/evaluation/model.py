"""The model as lm-eval sees it: HFLM on a live model, with our progress bar and bounded memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from .batch import BatchTooLarge, out_of_memory, too_long
from .context import fed_tokens
from .metered import Metered

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Request = tuple[Any, list[int], list[int]]
"""As lm-eval has it: its text, the context's tokens, the answer's."""
_REMEMBERED = 16
"""Texts whose tokens are remembered: a question and its answers."""
Base: Any = HFLM  # its registration decorator hides the class from type checkers


class MeteredLM(Metered, Base):
    """HFLM that reports tokens as it goes, and counts the requests that it had to shorten.

    With `logits`, requests are put together by their tokens: as many as make so many logits, and no more tokens than
    `batch_size` of the longest contexts have. A GPU takes little longer for a hundred short ones than for one, and what
    it computes for each layer has to be launched once.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        batch_size: int,
        context: int,
        logits: int = 0,
        accelerator: Any = None,
    ) -> None:
        # The batch size must be given here: simple_evaluate ignores its own with a model object.
        super().__init__(
            context=context, pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=context
        )
        self.together = min(logits // model.config.get_text_config().vocab_size, batch_size * context)
        """Tokens of a forward pass; 0: as many rows as the batch size says, however short."""
        self._encoded: dict[Any, list[int]] = {}
        if accelerator is not None:  # with a model object lm-eval leaves this to the caller
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def tok_encode(self, string: str, *arguments: Any, **options: Any) -> list[int]:
        """As HFLM; of a question, whose answers come one after the other, once."""
        key = string, arguments, *options.items()
        if key not in self._encoded:  # lru_cache would hold on to this object, and to its model's memory
            if len(self._encoded) == _REMEMBERED:
                del self._encoded[next(iter(self._encoded))]
            self._encoded[key] = super().tok_encode(string, *arguments, **options)
        return [*self._encoded[key]]

    def _loglikelihood_tokens(self, requests: Sequence[Request], disable_tqdm: bool = False, **options: Any) -> Any:
        answers: dict[int, Any] = {}
        for numbers, rows in self._batches(requests):
            with self._batch_size(rows):
                some = super()._loglikelihood_tokens([requests[number] for number in numbers], **options)
            answers |= zip(numbers, some, strict=True)
        return [answers[number] for number in range(len(requests))]

    def _batches(self, requests: Sequence[Request]) -> Iterator[tuple[list[int], int]]:
        """Numbers of requests that go together, the longest first, and the rows that they make.

        Answers to the same context that differ in their last token share a row, as HFLM has it. It reads the wrong
        positions where the same tokens are divided elsewhere into context and answer, so such never go together.
        """
        fed = [(*context, *answer[:-1])[-self.context :] for _, context, answer in requests]
        numbers, rows, room = list[int](), 0, 0
        order = ((-len(tokens), tokens, len(requests[number][2]), number) for number, tokens in enumerate(fed))
        last: tuple[Any, int] | None = None
        for _, tokens, answer, number in sorted(order):
            new = last is None or last[0] != tokens
            if numbers and (rows == room if new else last != (tokens, answer)):
                yield numbers, rows
                numbers, rows, new = [], 0, True
            if not numbers:
                room = max(1, self.together // max(1, len(tokens))) if self.together else self.batch_size
            rows += new
            numbers.append(number)
            last = tokens, answer
        if numbers:
            yield numbers, rows

    @contextmanager
    def _batch_size(self, size: int) -> Iterator[None]:
        before, self.batch_size_per_gpu = self.batch_size_per_gpu, size
        try:
            yield
        finally:
            self.batch_size_per_gpu = before

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As HFLM, so many windows at a time as `together` allows, or one.

        HFLM holds logits and log-probabilities of a whole batch, 2 x batch x window x vocabulary floats: with 8
        windows of 2048 tokens and a vocabulary of 256k that is 34 GB, for nothing, because one window fills a device.
        """
        windows = max(1, self.together // self.context)
        try:
            with out_of_memory(), self._batch_size(windows):
                return super().loglikelihood_rolling(requests)
        except BatchTooLarge as error:
            if windows > 1:
                raise
            raise too_long() from error  # a smaller batch would change nothing

    def truncated_everywhere(self) -> int:
        """Shortened requests, over all processes."""
        if self.world_size == 1:
            return self.truncated
        return int(self.accelerator.reduce(torch.tensor(self.truncated, device=self.device)).item())

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = super()._model_call(inps, *args, **kwargs)
        self.on_tokens(inps.numel())
        return logits


def load(
    model_dir: Path,
    *,
    device: str,
    dtype: str,
    batch_size: int,
    max_length: int,
    logits: int = 0,
    accelerator: Any = None,
) -> MeteredLM:
    """Load a folder (plain transformers or CLA) for lm-eval; contexts never exceed what the model was built for.

    `logits` as for MeteredLM.
    """
    from ..models.export import load_tokenizer, loading
    from ..models.placement import load_where_it_fits

    place = str(accelerator.device) if accelerator is not None else device
    model = load_where_it_fits(model_dir, dtype=dtype, device=place)
    context = fed_tokens(model.config, max_length)
    tokenizer = load_tokenizer(model_dir)
    with loading(f"lm-eval cannot use the model in {model_dir}", "Check its config.json and its tokenizer."):
        return MeteredLM(
            model,
            tokenizer,
            batch_size=batch_size,
            context=context,
            logits=logits,
            accelerator=accelerator,
        )
