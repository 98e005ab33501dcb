"""A model without its layers: what goes into the first, what else each is told, and what follows the last.

transformers' own model runs with stand-ins for its decoder layers, which write down how they are called. So embeddings,
positions, masks, rotary tables and logits are each family's own, and nothing here knows about families.
"""

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..models.classes import cla_classes
from ..models.export import IMPLEMENTATIONS, fill_computed
from ..models.families import family_of
from ..models.scoring import check_ids

_ROWS = 8192
"""Of the embedding, read at a time."""
_NOT_SETTINGS = {"model_type", "kv_source_layers", "quantization_config", *IMPLEMENTATIONS}


class Source(Protocol):
    """A lazily read checkpoint."""

    @property
    def config(self) -> dict[str, Any]:
        """Contents of config.json."""
        ...

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Everything the checkpoint holds, by name."""
        ...

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """One tensor, or some rows of it that follow each other, on the CPU."""
        ...


class _StandIn(nn.Module):
    """In place of a decoder layer: passes the residual stream on, or replaces it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._signature = inspect.signature(layer.forward)
        self.call: dict[str, Any] = {}
        self.seen: Any = None
        self.output: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        bound = self._signature.bind(*args, **kwargs).arguments
        self.call = {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}
        self.seen = self.call.pop("hidden_states")
        return self.seen if self.output is None else self.output


class Skeleton:
    """Embeddings, positions and head of one model; its layers are built one at a time by whoever needs them."""

    def __init__(self, source: Source, config: dict[str, Any], tokens: Tensor, device: torch.device) -> None:
        """Build the empty model and learn how its layers are called on rows of `tokens` [rows, T].

        Only the embeddings of tokens that occur are kept. Raises InputError for a family that is not supported, or
        tokens that the model does not know.
        """
        self.source, self.device, self.family = source, device, family_of(config)
        classes = cla_classes(self.family)
        # A copy, because configurations change what they are given.
        settings = {k: deepcopy(v) for k, v in config.items() if k not in _NOT_SETTINGS}
        self.config: Any = classes["Config"](**settings)
        with torch.device("meta"):
            self._model = classes["ForCausalLM"](self.config).eval().requires_grad_(False)
        self._stack: Any = self._model.get_submodule(self.family.layers)
        self.layer_class = type(self._stack[0])
        for index, layer in enumerate(self._stack):
            self._stack[index] = _StandIn(layer)
        check_ids(self._model, tokens)
        self._known = tokens.unique()
        fill_computed(self._model, device)
        self._load_weights()
        self.embed(tokens[:1])
        self.calls: list[dict[str, Any]] = [stand_in.call for stand_in in self._stack]
        """Per layer what it is given beside the residual stream, for one row."""

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """What the first layer reads, float32 [rows, T, hidden] on the device."""
        known = torch.searchsorted(self._known, tokens.contiguous()).to(self.device)
        self._model.base_model(input_ids=known, use_cache=False)
        return self._stack[0].seen

    def head(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The end of the model: residual [rows, T, hidden] -> logits [rows, T, vocabulary]."""
        own, shared = (self._name(m.weight) for m in (self._model.get_output_embeddings(), self._embedding))
        weight = self.source.read(own if own in self.source.tensors else shared)
        self._model.get_output_embeddings().weight = _frozen(weight.to(self.device, dtype))

        def logits(residual: Tensor) -> Tensor:
            self._stack[-1].output = residual
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                return self._model(inputs_embeds=residual, use_cache=False).logits

        return logits

    @property
    def _embedding(self) -> Any:
        return self._model.get_input_embeddings()

    def _name(self, weight: Tensor) -> str:
        return next(name for name, parameter in self._model.named_parameters() if parameter is weight)

    def _load_weights(self) -> None:
        """Everything but the head, float32: norms, learned positions, embeddings of the tokens that occur."""
        embedding, head = self._name(self._embedding.weight), self._name(self._model.get_output_embeddings().weight)
        names = self._model.state_dict().keys() & self.source.tensors.keys() - {embedding, head}
        weights = {name: self.source.read(name).to(self.device, torch.float32) for name in sorted(names)}
        self._model.load_state_dict(weights, strict=False, assign=True)
        rows = self._rows_of_known(embedding).to(self.device, torch.float32)
        self._embedding.weight, self._embedding.padding_idx = _frozen(rows), None

    def _rows_of_known(self, name: str) -> Tensor:
        """Rows of the tokens that occur, read in blocks: all of a large vocabulary may be more than a layer."""
        blocks = []
        for start in range(0, int(self._known[-1]) + 1, _ROWS):
            here = self._known[(self._known >= start) & (self._known < start + _ROWS)] - start
            blocks.append(self.source.read(name, slice(start, start + _ROWS))[here])
        return torch.cat(blocks)


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
