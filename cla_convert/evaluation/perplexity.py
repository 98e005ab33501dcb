"""Likelihood of tokens on packed rows, with bounded memory: for validation, the held-out text and any text file."""

import math
from typing import TYPE_CHECKING

import torch

from ..bars import tick
from ..models.scoring import (
    Forward,
    check_ids,
    evaluating,
    log_probabilities,
    nll,
    output_head,
    positions_at_a_time,
    split_model,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Window = tuple[float, int]
"""Summed negative log-likelihood of a row in nats, and how many tokens that were."""


def token_perplexity(model: "PreTrainedModel", rows: torch.Tensor, *, batch_size: int = 1) -> dict[str, float]:
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


def row_windows(model: "PreTrainedModel", rows: torch.Tensor, *, batch_size: int = 1) -> list[Window]:
    """Nats and tokens of every row; arguments as for `token_perplexity`. Raises InputError as `check_ids`."""
    if rows.ndim != 2 or rows.shape[1] < 2 or not len(rows):
        raise ValueError(f"rows must have the shape [n, T] with n >= 1 and T >= 2, not {tuple(rows.shape)}")
    check_ids(model, rows)
    nats: list[float] = []
    with torch.no_grad(), evaluating(model):
        body, head = split_model(model, rows[:1])
        step = positions_at_a_time(output_head(model).weight.shape[0])
        for batch in rows.split(batch_size):
            nats += _batch_nats(body, head, batch.to(model.device), step)
            tick("rows", len(batch))
    return [(row, rows.shape[1] - 1) for row in nats]


def _batch_nats(body: Forward, head: Forward, ids: torch.Tensor, step: int) -> list[float]:
    """Summed nats of every row of a batch [B, T]; logits exist for `step` positions at a time, in float32."""
    hidden = body(ids[:, :-1]).flatten(0, 1)  # [B * (T - 1), width]
    targets = ids[:, 1:].flatten()
    losses = [nll(log_probabilities(head(states)), labels)
              for states, labels in zip(hidden.split(step), targets.split(step), strict=True)]  # fmt: skip
    return torch.cat(losses).view(len(ids), -1).cpu().double().sum(dim=1).tolist()
