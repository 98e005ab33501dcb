"""The attention kind of each layer, from a config.json as people have them: transformers' own rules, without torch.

Only layers of one kind may share: a consumer attends with its own mask and its own rotation to keys that its owner
made. Newer files list `layer_types`; older ones leave transformers to derive them, by a rule of each family.
`tests/unit/test_families.py` holds these rules to transformers' configuration classes.
"""

from collections.abc import Callable, Mapping
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"
NOPE = ", no RoPE"
"""Ends the kind of a layer that does not rotate its queries and keys."""

Config = Mapping[str, Any]
Kinds = Callable[[Config], list[str]]


def full(config: Config) -> list[str]:
    """Every layer sees everything before it."""
    return [FULL] * config["num_hidden_layers"]


def windowed(config: Config) -> list[str]:
    """One `sliding_window` for all layers, or none (Mistral, Phi-3, StarCoder2)."""
    kind = FULL if config.get("sliding_window") is None else SLIDING
    return [kind] * config["num_hidden_layers"]


def late_windows(config: Config) -> list[str]:
    """Layers from `max_window_layers` on slide, if `use_sliding_window` says so (Qwen 2 and 3)."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    slides = bool(config.get("use_sliding_window")) and config["sliding_window"] is not None
    return [
        SLIDING if slides and layer >= config["max_window_layers"] else FULL
        for layer in range(config["num_hidden_layers"])
    ]
