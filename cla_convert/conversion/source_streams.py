"""The source model's residual streams: what the student is pulled towards."""

from torch import Tensor

from .factories import Factories
from .streams import Store, Stream, batches, divided


class SourceStreams:
    """The source model's residual streams, computed only as far ahead as a group reaches."""

    def __init__(self, factories: Factories, tokens: Tensor, store: Store) -> None:
        self._factories, self._store, self._next = factories, store, 0
        first, rows = store.empty(*tokens.shape, factories.first.config.hidden_size), divided(tokens, factories.count)
        for part in batches(rows, factories.batch):
            first[part] = factories.first.skeleton.embed(rows[part])
        self.inputs: dict[int, Stream] = {0: first}
        """Layer -> stream it reads."""
        self.residuals: dict[int, Stream] = {}
        """Layer -> stream after its attention."""

    def upto(self, layer: int) -> None:
        """Run all layers up to and including `layer`."""
        for index in range(self._next, layer + 1):
            if not self._factories.first.attends(index):
                self._pass(index)
                continue
            blocks = self._factories.build(index, self._factories.read_layer(index))
            hidden = self.inputs[index]
            residual, output = (self._store.empty(*hidden.shape) for _ in range(2))
            for part in batches(hidden, self._factories.batch):
                block, h = blocks[part.device], self._factories.load(hidden, part)
                r = block.attend(h, block.heads(block.norm_in(h), {}))
                residual[part] = r
                output[part] = block.mlp(h, r)
            self.residuals[index], self.inputs[index + 1] = residual, output
        self._next = max(self._next, layer + 1)

    def _pass(self, index: int) -> None:
        """Run a layer without attention."""
        past, hidden = self._factories.passages(index), self.inputs[index]
        self.inputs[index + 1] = output = self._store.empty(*hidden.shape)
        for part in batches(hidden, self._factories.batch):
            output[part] = past[part.device](self._factories.load(hidden, part))

    def release(self, layer: int) -> None:
        """Free the streams of a layer the walk has passed."""
        self.inputs.pop(layer)
        self.residuals.pop(layer, None)
