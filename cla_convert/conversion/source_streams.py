"""The source model's residual streams: what the student is pulled towards."""

from torch import Tensor

from .blocks import Factory
from .streams import Store, batches


class SourceStreams:
    """The source model's residual streams, computed only as far ahead as a group reaches."""

    def __init__(self, factory: Factory, tokens: Tensor, store: Store) -> None:
        self._factory, self._store, self._next = factory, store, 0
        first = store.empty(*tokens.shape, factory.config.hidden_size)
        for part in batches(tokens, factory.batch):
            first[part] = factory.skeleton.embed(tokens[part]).to(first.device)
        self.inputs: dict[int, Tensor] = {0: first}
        """Layer -> stream it reads."""
        self.residuals: dict[int, Tensor] = {}
        """Layer -> stream after its attention."""

    def upto(self, layer: int) -> None:
        """Run all layers up to and including `layer`."""
        for index in range(self._next, layer + 1):
            if not self._factory.attends(index):
                self._pass(index)
                continue
            block = self._factory.build(index, self._factory.read_layer(index))
            hidden = self.inputs[index]
            residual, output = (self._store.empty(*hidden.shape) for _ in range(2))
            for part in batches(hidden, self._factory.batch):
                h = self._factory.load(hidden[part])
                r = block.attend(h, block.heads(block.norm_in(h), {}))
                residual[part] = r.to(residual.device)
                output[part] = block.mlp(h, r).to(output.device)
            self.residuals[index], self.inputs[index + 1] = residual, output
        self._next = max(self._next, layer + 1)

    def _pass(self, index: int) -> None:
        """Run a layer without attention."""
        past, hidden = self._factory.passage(index), self.inputs[index]
        self.inputs[index + 1] = self._store.empty(*hidden.shape)
        for part in batches(hidden, self._factory.batch):
            self.inputs[index + 1][part] = past(self._factory.load(hidden[part])).to(hidden.device)

    def release(self, layer: int) -> None:
        """Free the streams of a layer the walk has passed."""
        self.inputs.pop(layer)
        self.residuals.pop(layer, None)
