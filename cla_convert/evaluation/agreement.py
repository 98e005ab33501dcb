"""How far a model's predictions are from the source model's: KL divergence and top-1 agreement on the same text.

Accuracies and perplexities may stay while a model answers differently; these two see every change. Both models read
the same rows, and both distributions exist for a few positions at a time only.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..bars import tick
from ..files import plain
from ..models.scoring import (
    Forward,
    check_ids,
    evaluating,
    kl,
    log_probabilities,
    nll,
    output_head,
    positions_at_a_time,
    split_model,
)
from .perplexity import Window, totals
from .statistics import clustered_share, positive_interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def agreement(
    model: "PreTrainedModel", source: "PreTrainedModel", rows: torch.Tensor, *, batch_size: int = 1
) -> dict[str, Any]:
    """Compare the next-token distributions of `model` with those of `source` at every position of every row.

    Args:
        model: a causal language model of transformers (plain or CLA).
        source: the source model, with the same vocabulary.
        rows: token ids [n, T] without padding.
        batch_size: rows per forward pass.

    Returns:
        kl: mean KL(source || model) in nats per token; top1: share of positions whose most probable token is the
        same, 0 to 1; tokens = n * T; ci95 of both, over rows; windows: [kl in nats, agreeing, tokens] of every row;
        perplexity of `model` on these rows, and nll, its logarithm.
    """
    check_ids(model, rows)
    windows: list[list[float]] = []
    likelihoods: list[Window] = []
    with evaluating(model, source):
        parts = [split_model(one, rows[:1]) for one in (model, source)]
        step = positions_at_a_time(output_head(model).weight.shape[0])
        for batch in rows.split(batch_size):
            divergences, same, nats = _batch(parts, [batch.to(one.device) for one in (model, source)], step)
            windows += [
                [divergence, agreeing, rows.shape[1]] for divergence, agreeing in zip(divergences, same, strict=True)
            ]
            likelihoods += [(row, rows.shape[1] - 1) for row in nats]
            tick("rows", len(batch))
    per_token = np.array(windows)[:, :2] / rows.shape[1]
    return {
        "kl": float(per_token[:, 0].mean()),
        "top1": float(per_token[:, 1].mean()),
        "tokens": rows.numel(),
        "ci95": {
            "kl": plain(positive_interval(per_token[:, 0])),
            "top1": plain(clustered_share(per_token[:, 1], rows.shape[1])),
        },
        "windows": windows,
        **{name: value for name, value in totals(likelihoods).items() if name != "tokens"},
    }


def _batch(parts: list[tuple[Forward, Forward]], ids: list[torch.Tensor], step: int) -> list[list[float]]:
    """Summed KL in nats, agreeing positions, and the model's summed nats of every row of a batch."""
    (body, head), (source_body, source_head) = parts
    hidden, source_hidden = body(ids[0]).flatten(0, 1), source_body(ids[1]).flatten(0, 1)  # [B * T, width]
    following = torch.cat((ids[0][:, 1:], ids[0][:, :1]), dim=1).flatten()  # nothing is known to follow the last token
    divergences, same, nats = [], [], []
    for states, source_states, targets in zip(
        hidden.split(step), source_hidden.split(step), following.split(step), strict=True
    ):
        log_p = log_probabilities(head(states))
        log_q = log_probabilities(source_head(source_states).to(log_p.device))
        divergences.append(kl(log_q, log_p))
        same.append(log_p.argmax(-1) == log_q.argmax(-1))
        nats.append(nll(log_p, targets))
    whole = [torch.cat(part).view(len(ids[0]), -1).cpu().double() for part in (divergences, same, nats)]
    whole[2] = whole[2][:, :-1]
    return [part.sum(dim=1).tolist() for part in whole]
