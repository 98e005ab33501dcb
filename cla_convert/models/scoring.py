"""What a model says of tokens: hidden states -> logits -> negative log-likelihood, divergence from another model.

Validation, perplexity, agreement, domains and the sensitivity of layers all score with these; training has its fused
loss. Logits exist for a few positions at a time, in float32 (a vocabulary of 262k is a gigabyte for a thousand), and
every value is one position's, for the caller to add up in float64 on the CPU, which not every device has.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_LOGITS = 2**24
"""Largest number of logits held at a time (64 MiB in float32)."""

Forward = Callable[[Tensor], Tensor]


def hidden_states(model: "PreTrainedModel", ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Final hidden states [B, T, D] of tokens [B, T], without the vocabulary projection.

    Without a mask and a cache, transformers (masking_utils.find_packed_sequence_indices) takes every restart of
    `position_ids` [B, T] for a new document and lets attention see that document only.
    """
    return model.base_model(input_ids=ids, position_ids=position_ids, use_cache=False).last_hidden_state


def output_head(model: "PreTrainedModel") -> nn.Linear:
    """The output projection."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear), "a causal language model has an output projection"
    return head


def check_ids(model: "PreTrainedModel", ids: Tensor, which: str = "model") -> None:
    """Raise InputError if token ids lie beyond the model's embedding; `which` model is said."""
    embedding: Any = model.get_input_embeddings()
    rows, highest = embedding.weight.shape[0], int(ids.max())
    if highest >= rows:
        raise InputError(
            f"The tokenizer is not the {which}'s",
            why=f"It gives token {highest}; the {which} knows {rows}.",
            fix="Use the model's own tokenizer, or text without this token if it is a special one.",
        )


def split_model(model: "PreTrainedModel", sample: Tensor) -> tuple[Forward, Forward]:
    """The model as body (ids -> hidden states) and head (hidden states -> logits).

    Some families scale or cap their logits after the output projection. Instead of a list of them: compare once with
    what the model itself returns, and where that differs let it compute all logits.
    """
    ids = sample[:, :8].to(model.device)

    def body(batch: Tensor) -> Tensor:
        return hidden_states(model, batch)

    def whole(batch: Tensor) -> Tensor:
        return model(input_ids=batch, use_cache=False).logits

    head = output_head(model)
    logits = head(body(ids)).float()  # of a model on several GPUs: on the last
    if torch.allclose(logits, whole(ids).to(logits), rtol=1e-3, atol=1e-3):
        return body, head
    return whole, lambda logits: logits


def positions_at_a_time(vocabulary: int) -> int:
    """Positions whose logits may exist together."""
    return max(1, _LOGITS // vocabulary)


def log_probabilities(logits: Tensor) -> Tensor:
    """Of logits [n, V], in float32."""
    return F.log_softmax(logits.float(), dim=-1)


def nll(log_p: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of `targets` [n] under log-probabilities [n, V]."""
    return -log_p.gather(1, targets.to(log_p.device)[:, None])[:, 0]


def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) in nats, [n], of log-probabilities [n, V]."""
    # clamp: the sum of many terms that cancel can end a rounding error below zero
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).clamp(min=0)


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Evaluation mode inside, the former mode afterwards."""
    modes = [(model, model.training) for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, training in modes:
            model.train(training)
