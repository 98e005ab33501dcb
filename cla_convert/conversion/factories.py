"""The layers of one model on several devices, each of which runs them on its share of the rows.

One process hands work to all: a GPU computes what it was given while the next is given its own. What happens once (the
closed form, embeddings, the head) happens on the first device; weights are read there and copied to the others.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .blocks import Block, Factory, Passage
from .streams import Part, Stream

WIDE_ENOUGH = 2048
"""Hidden size from which several GPUs are used: a smaller model's steps are soon over, and handing them out is not."""


def devices_for(device: str | Sequence[str], hidden_size: int, rows: int) -> list[str]:
    """The devices that share so many rows of text: those named; `cuda`, of no number, means all GPUs of the machine."""
    if device == "cuda" and hidden_size >= WIDE_ENOUGH:
        device = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [device] if isinstance(device, str) else list(device)[:rows]


class Factories:
    """A factory for each device."""

    def __init__(self, first: Factory, devices: Sequence[str]) -> None:
        """`first` is that of the first of `devices`."""
        self.first, self._all = first, [first, *(first.on(device) for device in devices[1:])]
        self.devices = [factory.device for factory in self._all]
        self.count, self.batch = len(self._all), first.batch

    def load(self, stream: Stream, part: Part) -> Tensor:
        """A part of a residual stream as layers take it: on its device, float32."""
        return self._all[part.device].load(stream[part])

    def read_layer(self, index: int, *, mlp: bool = True) -> dict[str, Tensor]:
        """`Factory.read_layer`, on the first device."""
        return self.first.read_layer(index, mlp=mlp)

    def build(
        self, index: int, weights: Mapping[str, Tensor], group: Sequence[int] = (), *, training: bool = False
    ) -> list[Block]:
        """`Factory.build` on every device, of weights on the first."""
        return [factory.build(index, self._moved(weights, factory), group, training=training) for factory in self._all]

    def passages(self, index: int) -> list[Passage]:
        """`Factory.passage` on every device."""
        weights = self.read_layer(index)
        return [factory.passage(index, self._moved(weights, factory)) for factory in self._all]

    def _moved(self, weights: Mapping[str, Tensor], factory: Factory) -> Mapping[str, Tensor]:
        if factory is self.first:
            return weights
        return {name: weight.to(factory.device, copy=True) for name, weight in weights.items()}
