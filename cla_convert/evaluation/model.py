"""The model as lm-eval sees it: HFLM on a live model, with our progress bar and bounded memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from .batch import BatchTooLarge, out_of_memory, too_long
from .context import fed_tokens
from .metered import Metered

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Base: Any = HFLM  # its registration decorator hides the class from type checkers


class MeteredLM(Metered, Base):
    """HFLM that reports tokens as it goes, and counts the requests that it had to shorten."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        batch_size: int,
        context: int,
        accelerator: Any = None,
    ) -> None:
        # The batch size must be given here: simple_evaluate ignores its own with a model object.
        super().__init__(
            context=context, pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=context
        )
        if accelerator is not None:  # with a model object lm-eval leaves this to the caller
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As HFLM, one window at a time.

        HFLM holds logits and log-probabilities of a whole batch, 2 x batch x window x vocabulary floats: with 8
        windows of 2048 tokens and a vocabulary of 256k that is 34 GB, for nothing, because one window fills a device.
        """
        batch_size, self.batch_size_per_gpu = self.batch_size_per_gpu, 1
        try:
            with out_of_memory():
                return super().loglikelihood_rolling(requests)
        except BatchTooLarge as error:  # a smaller batch would change nothing
            raise too_long() from error
        finally:
            self.batch_size_per_gpu = batch_size

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
    model_dir: Path, *, device: str, dtype: str, batch_size: int, max_length: int, accelerator: Any = None
) -> MeteredLM:
    """Load a folder (plain transformers or CLA) for lm-eval; contexts never exceed what the model was built for."""
    from ..models.export import load_tokenizer, loading
    from ..models.placement import load_where_it_fits

    place = str(accelerator.device) if accelerator is not None else device
    model = load_where_it_fits(model_dir, dtype=dtype, device=place)
    context = fed_tokens(model.config, max_length)
    tokenizer = load_tokenizer(model_dir)
    with loading(f"lm-eval cannot use the model in {model_dir}", "Check its config.json and its tokenizer."):
        return MeteredLM(model, tokenizer, batch_size=batch_size, context=context, accelerator=accelerator)
