"""Likelihood of tokens on packed rows, with bounded memory: for validation, the held-out text and any text file."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

_LOGITS = 2**24
"""Largest number of logits held at a time (64 MiB in float32)."""

Head = Callable[[torch.Tensor], torch.Tensor]
Window = tuple[float, int]
"""Summed negative log-likelihood of a row in nats, and how many tokens that were."""


def token_perplexity(model: Any, rows: torch.Tensor, *, batch_size: int = 1) -> dict[str, float]:
    """Mean negative log-likelihood of every token given the ones before it in its row.

    Args:
        model: a causal language model of transformers (plain or CLA).
        rows: token ids [n, T], T >= 2, without padding.
        batch_size: rows per forward pass.

    Returns:
        perplexity = exp(nll), nll in nats per predicted token, tokens = n * (T - 1).
    """
    return totals(row_windows(model, rows, batch_size=batch_size))


def totals(windows: list[Window]) -> dict[str, float]:
    """`{perplexity, nll, tokens}` over all rows, every token weighing the same."""
    tokens = sum(count for _, count in windows)
    nll = sum(nats for nats, _ in windows) / tokens
    return {"perplexity": math.exp(nll) if nll < 700 else math.inf, "nll": nll, "tokens": tokens}


def row_windows(model: Any, rows: torch.Tensor, *, batch_size: int = 1) -> list[Window]:
    """Nats and tokens of every row; arguments as for `token_perplexity`."""
    if rows.ndim != 2 or rows.shape[1] < 2 or not len(rows):
        raise ValueError(f"rows must have the shape [n, T] with n >= 1 and T >= 2, not {tuple(rows.shape)}")
    nats: list[float] = []
    with torch.no_grad(), evaluating(model):
        body, head = split_model(model, rows[:1])
        step = positions_at_a_time(model)
        for batch in rows.split(batch_size):
            nats += _batch_nats(body, head, batch.to(model.device), step)
    return [(row, rows.shape[1] - 1) for row in nats]


def _batch_nats(body: Head, head: Head, ids: torch.Tensor, step: int) -> list[float]:
    """Summed nats of every row of a batch [B, T]; logits exist for `step` positions at a time, in float32."""
    hidden = body(ids)[:, :-1].flatten(0, 1)  # [B * (T - 1), width]
    targets = ids[:, 1:].flatten()
    losses = [F.cross_entropy(head(states).float(), labels, reduction="none")
              for states, labels in zip(hidden.split(step), targets.split(step), strict=True)]  # fmt: skip
    # Summed on the CPU in float64, which not every device has.
    return torch.cat(losses).view(len(ids), -1).cpu().double().sum(dim=1).tolist()


def positions_at_a_time(model: Any) -> int:
    """Positions whose logits may exist together."""
    return max(1, _LOGITS // model.get_output_embeddings().weight.shape[0])


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


def split_model(model: Any, sample: torch.Tensor) -> tuple[Head, Head]:
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
