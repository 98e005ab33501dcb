"""Where each tensor of a model lies in its files, as transformers loads it: read alone, by rows, and taken apart again.

Most tensors are stored under their own name. Some lie under another one (a checkpoint without its prefix `model.`), and
experts, which a model holds stacked, are stored one by one. Which, transformers' own table of conversions says.
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Part(NamedTuple):
    """A tensor of the files that a tensor of the model is made of."""

    name: str
    converter: int | None
    """Number of the conversion that it goes through with others; None: it is the model's as it lies."""
    pattern: str
    """Which of the conversion's sources it is."""


class StoredTensors:
    """The tensors of one model and of its files, both ways."""

    def __init__(self, checkpoint: Checkpoint, model: "PreTrainedModel") -> None:
        """Find out what is made of what.

        Args:
            checkpoint: opened `as_stored`.
            model: of the folder; on the meta device will do. Not changed.
        """
        self.checkpoint, self._model = checkpoint, model
        conversions = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self.parts: dict[str, list[Part]] = {}
        """Name in the model -> what it is made of, experts in their order. Tied names have what their files have."""
        known: dict[str, Any] = model.state_dict()
        for name in sorted(checkpoint.tensors, key=dot_natural_key):
            for target, part in self._targets(name, known):
                self.parts.setdefault(target, []).append(part)

    @property
    def unused(self) -> set[str]:
        """Tensors of the files that nothing of the model is made of."""
        return self.checkpoint.tensors.keys() - {part.name for parts in self.parts.values() for part in parts}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor of the model in the files; None if it is made of several, or missing."""
        parts = self.parts.get(name, [])
        return None if [part.converter for part in parts] != [None] else self.checkpoint.tensors[parts[0].name].shape

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A tensor of the model, or some rows of it, on the CPU in the dtype of the files; no other is read."""
        parts = self.parts[name]
        if parts[0].converter is None:
            return self.checkpoint.read(parts[0].name, rows)
        converter: Any = deepcopy(self._converters[parts[0].converter])
        for part in parts:
            converter.add_tensor(name, part.name, part.pattern, partial(self.checkpoint.read, part.name))
        made = converter.convert(name, model=self._model, config=self._model.config)[name]
        whole: Tensor = made[0] if isinstance(made, list) else made
        return whole if rows == slice(None) else whole[rows].clone()

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What the files hold of a tensor of the model, by their names."""
        parts = self.parts[name]
        if parts[0].converter is None:
            return {parts[0].name: tensor}
        return revert_weight_conversion(self._model, {name: tensor})

    def _targets(self, name: str, known: dict[str, Any]) -> Sequence[tuple[str, Part]]:
        """Which tensors of the model a stored one goes into."""
        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, known)
        if target not in known and name in known:  # as transformers does: it should not have been renamed
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if pattern is None:
            return [(target, Part(name, None, ""))] if target in known else []
        number = next(i for i, entry in enumerate(self._converters) if pattern in entry.source_patterns)
        first, *_ = patterns = self._converters[number].target_patterns
        targets = [target.replace(first, other) for other in patterns]
        return [(target, Part(name, number, pattern)) for target in targets if target in known]
