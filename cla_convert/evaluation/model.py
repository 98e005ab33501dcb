"""The model as lm-eval sees it: HFLM on a live model, with our progress bar and bounded memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from ..errors import InputError
from .batch import BatchTooLarge, out_of_memory, too_long


def choose_dtype(dtype: str, device: str) -> str:
    """`auto` is float32 on a CPU and bfloat16 on an accelerator, however the weights are stored.

    It must not follow the checkpoint: source, converted and uptrained model may be stored differently and have to be
    measured alike.
    """
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.startswith("cuda") else "float32"


Base: Any = HFLM  # its registration decorator hides the class from type checkers


class MeteredLM(Base):
    """HFLM that reports tokens as it goes, and counts the requests that it had to shorten."""

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int, max_length: int, accelerator: Any = None
    ) -> None:
        # The batch size must be given here: simple_evaluate ignores its own with a model object.
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        if accelerator is not None:  # with a model object lm-eval leaves this to the caller
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self.on_tokens: Callable[[int], None] = lambda _: None
        self.truncated = 0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As HFLM, without its bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As HFLM, without its bar."""
        return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As HFLM, one window at a time.

        HFLM holds logits and log-probabilities of a whole batch, 2 x batch x window x vocabulary floats: with 8
        windows of 2048 tokens and a vocabulary of 256k that is 34 GB, for nothing, because one window fills a device.
        """
        batch_size, self.batch_size_per_gpu = self.batch_size_per_gpu, 1
        try:
            with out_of_memory():
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
        except BatchTooLarge as error:  # a smaller batch would change nothing
            raise too_long() from error
        finally:
            self.batch_size_per_gpu = batch_size

    def truncated_everywhere(self) -> int:
        """Shortened requests, over all processes."""
        if self.world_size == 1:
            return self.truncated
        return int(self.accelerator.reduce(torch.tensor(self.truncated, device=self.device)).item())

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        longest = max(len(target) for _, _, target in requests)
        if longest > self.max_length:  # lm-eval stops at a bare assertion here
            raise InputError(
                f"An answer of {longest} tokens does not fit into the context of {self.max_length}",
                why="eval.max_length, or what the model was built for, is shorter than an answer to be scored.",
                fix="Raise eval.max_length, or leave this task out.",
            )
        self.truncated += sum(len(context) + len(target) > self.max_length + 1 for _, context, target in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = super()._model_call(inps, *args, **kwargs)
        self.on_tokens(inps.numel())
        return logits


def load(
    model_dir: Path, *, device: str, dtype: str, batch_size: int, max_length: int, accelerator: Any = None
) -> MeteredLM:
    """Load a folder (plain transformers or CLA) for lm-eval; contexts never exceed what the model was built for."""
    from ..models.export import load_model, load_tokenizer

    place = str(accelerator.device) if accelerator is not None else device
    model = load_model(model_dir, dtype=dtype, device=place).eval()
    length = fed_tokens(model.config, max_length)
    tokenizer = load_tokenizer(model_dir)
    return MeteredLM(model, tokenizer, batch_size=batch_size, max_length=length, accelerator=accelerator)


def fed_tokens(config: Any, max_length: int) -> int:
    """The longest context in tokens that a model is fed: `max_length`, or what it was built for if that is less."""
    return min(max_length, getattr(config.get_text_config(), "max_position_embeddings", None) or max_length)
