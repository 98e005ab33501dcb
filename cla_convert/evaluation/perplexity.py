"""Perplexity per token on packed rows, with bounded memory: used for validation and for the held-out text."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

_LOGITS = 2**24
"""Largest number of logits held at a time (64 MiB in float32)."""

Head = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def token_perplexity(model: Any, rows: torch.Tensor, *, batch_size: int = 1) -> dict[str, float]:
    """Mean negative log-likelihood of every token given the ones before it in its row.

    Args:
        model: a causal language model of transformers (plain or CLA).
        rows: token ids [n, T], T >= 2, without padding.
        batch_size: rows per forward pass.

    Returns:
        perplexity = exp(nll), nll in nats per predicted token, tokens = n * (T - 1).
    """
    if rows.ndim != 2 or rows.shape[1] < 2 or not len(rows):
        raise ValueError(f"rows must have the shape [n, T] with n >= 1 and T >= 2, not {tuple(rows.shape)}")
    training = model.training
    model.eval()
    try:
        body, head = _split(model, rows[:1])
        vocabulary = model.get_output_embeddings().weight.shape[0]
        batches = (batch.to(model.device) for batch in rows.split(batch_size))
        total = sum(_batch_nll(body, head, batch, vocabulary) for batch in batches)
    finally:
        model.train(training)
    tokens = rows.shape[0] * (rows.shape[1] - 1)
    nll = total / tokens
    return {"perplexity": math.exp(nll) if nll < 700 else math.inf, "nll": nll, "tokens": tokens}


def _batch_nll(body: Head, head: Head, ids: torch.Tensor, vocabulary: int) -> float:
    """Summed nats of a batch [B, T]; logits exist for a slice of positions only, in float32."""
    hidden = body(ids)[:, :-1].flatten(0, 1)  # [B * (T - 1), width]
    targets = ids[:, 1:].flatten()
    step = max(1, _LOGITS // vocabulary)
    total = 0.0
    for states, labels in zip(hidden.split(step), targets.split(step), strict=True):
        total += F.cross_entropy(head(states).float(), labels, reduction="sum").item()
    return total


def _split(model: Any, sample: torch.Tensor) -> tuple[Head, Head]:
    """The model as body (ids -> hidden states) and head (hidden states -> logits).

    Some families scale or cap their logits after the output projection. Instead of a list of them: compare once with
    what the model itself returns, and where that differs let it compute all logits.
    """
    ids = sample[:, :8].to(model.device)

    def body(batch: torch.Tensor) -> torch.Tensor:
        return model.base_model(input_ids=batch, use_cache=False).last_hidden_state

    def whole(batch: torch.Tensor) -> torch.Tensor:
        return model(input_ids=batch, use_cache=False).logits

    head = model.get_output_embeddings()
    if torch.allclose(head(body(ids)).float(), whole(ids).float(), rtol=1e-3, atol=1e-3):
        return body, head
    return whole, lambda logits: logits
