"""A layer's tensors as checkpoints store them and as the layer holds them: experts are stored apart and run stacked.

Done by transformers' own rules, those that loading and saving follow; the shipped modelling code registers them.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


class Pieces:
    """The rules of one family. Most have none: every stored tensor is one of the layer's."""

    def __init__(self, cla_type: str) -> None:
        rules = get_checkpoint_conversion_mapping(cla_type) or []
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def whole(self, name: str) -> str:
        """Name in the model of what a stored tensor is, or is a piece of."""
        return rename_source_key(name, self._renamings, self._converters)[0]

    def assemble(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors, by name. `stored` has all pieces of each."""
        found: dict[str, Tensor] = {}
        stacks: dict[str, Any] = {}
        by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        for name in sorted(stored, key=dot_natural_key):  # expert 10 comes after expert 9
            whole, pattern = rename_source_key(name, self._renamings, self._converters)
            if pattern is None:
                found[whole] = stored[name]
            else:
                stack = stacks.setdefault(whole, copy.deepcopy(by_pattern[pattern]))
                stack.add_tensor(whole, name, pattern, stored[name])
        for whole, stack in stacks.items():
            found |= stack.convert(whole)
        return found
