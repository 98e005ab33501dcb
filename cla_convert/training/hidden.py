"""How far the student's residual streams are from the teacher's, behind every layer.

KL says at the end of the model that something is wrong; this says in which layer. Each layer's targets are the
teacher's own, so that far fewer tokens settle what a layer has to do (TinyBERT, arXiv 1909.10351, section 3.1).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..models.families import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def recorded_streams(model: "PreTrainedModel") -> Iterator[list[Tensor]]:
    """The residual stream [B, T, D] behind every layer of the forward passes made inside, in order."""
    streams: list[Tensor] = []

    def keep(_layer: Any, _inputs: Any, output: Any) -> None:
        streams.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in decoder_layers(model)]
    try:
        yield streams
    finally:
        for hook in hooks:
            hook.remove()


def stream_distance(
    streams: Sequence[Tensor], targets: Sequence[Tensor], counted: Tensor, *, fused: bool = False
) -> Tensor:
    """|stream - target|^2 / |target|^2, averaged over layers and summed over the counted positions.

    Args:
        streams: [B, T, D] behind each layer of the student.
        targets: of the teacher, likewise.
        counted: bool [B, T].
        fused: compile it.
    """
    distance = _compiled() if fused else _distance
    total = torch.stack([distance(*pair, counted) for pair in zip(streams, targets, strict=True)])
    return total.mean()


def _distance(stream: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    stream, target = stream.float(), target.float()
    each = (stream - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)
    return (each * counted).sum()


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_distance, dynamic=False)
