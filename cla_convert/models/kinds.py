"""The attention kind of each layer, from a config.json as people have them: transformers' own rules, without torch.

Only layers of one kind may share: a consumer attends with its own mask and its own rotation to keys that its owner
made. Newer files list `layer_types`; older ones leave transformers to derive them, by a rule of each family.
`tests/unit/test_families.py` holds these rules to transformers' configuration classes.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"
STATES = ("conv", "linear_attention")
"""Layers of these kinds keep a state of one size in place of keys and values: there is nothing to share in them."""
NOPE = ", no RoPE"
"""Ends the kind of a layer that does not rotate its queries and keys."""

Config = Mapping[str, Any]
KindRule = Callable[[Config], list[str]]


def has_kv(kind: Hashable) -> bool:
    """Whether layers of this kind have keys and values."""
    return kind not in STATES


def full(config: Config) -> list[str]:
    """Every layer sees everything before it."""
    return [FULL] * config["num_hidden_layers"]


def windowed(config: Config) -> list[str]:
    """One `sliding_window` for all layers, or none (Mistral, Phi-3, StarCoder2)."""
    kind = FULL if config.get("sliding_window") is None else SLIDING
    return [kind] * config["num_hidden_layers"]


def listed_or_windowed(config: Config) -> list[str]:
    """`layer_types`, or else one `sliding_window` for all layers, or none (Ministral)."""
    return list(config.get("layer_types") or windowed(config))


def listed_or_full(config: Config) -> list[str]:
    """`layer_types`, or else every layer full (Mellum)."""
    return list(config.get("layer_types") or full(config))


def first_of_four(config: Config) -> list[str]:
    """Every fourth layer is full, beginning with the first (CWM)."""
    count = config["num_hidden_layers"]
    return list(config.get("layer_types") or [SLIDING if layer % 4 else FULL for layer in range(count)])


def optional_window(config: Config) -> list[str]:
    """One `sliding_window` for all layers, if `use_sliding_window` says so (Qwen 3 with experts)."""
    return windowed(config if config.get("use_sliding_window") else {**config, "sliding_window": None})


def late_windows(config: Config) -> list[str]:
    """Layers from `max_window_layers` on slide, if `use_sliding_window` says so (Qwen 2 and 3)."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    slides = bool(config.get("use_sliding_window")) and config["sliding_window"] is not None
    return [
        SLIDING if slides and layer >= config["max_window_layers"] else FULL
        for layer in range(config["num_hidden_layers"])
    ]


def alternating(config: Config) -> list[str]:
    """Sliding and full layers take turns (Gemma 2)."""
    return _every(2, config)


def three_to_one(config: Config) -> list[str]:
    """Every fourth layer is full (OLMo 3)."""
    return _every(4, config)


def five_to_one(config: Config) -> list[str]:
    """Every sixth layer is full (Gemma 3; the number is `sliding_window_pattern` in older files)."""
    return _every(config.get("sliding_window_pattern") or 6, config)


def early_windows(config: Config) -> list[str]:
    """Every other layer below `max_window_layers` slides, if `use_sliding_window` says so (Qwen 2 with experts)."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    slides = config["max_window_layers"] if config.get("use_sliding_window") else 0
    return [FULL if layer % 2 or layer >= slides else SLIDING for layer in range(config["num_hidden_layers"])]


def only_windows_rotate(config: Config) -> list[str]:
    """Every fourth layer is full and has no RoPE (Cohere 2, EXAONE 4; the number is `sliding_window_pattern`).

    Without a window all layers are full and have it (EXAONE 4).
    """
    if config.get("sliding_window") is None:
        return list(config.get("layer_types") or full(config))
    return [kind + (NOPE if kind == FULL else "") for kind in _every(config.get("sliding_window_pattern") or 4, config)]


def some_without_rope(config: Config) -> list[str]:
    """Layers that `no_rope_layers` marks with 0 do not rotate; only those slide, if any does (SmolLM3)."""
    count, interval = config["num_hidden_layers"], config["no_rope_layer_interval"]
    rotates = config.get("no_rope_layers") or [(layer + 1) % interval for layer in range(count)]
    slides = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    kinds = config.get("layer_types") or [SLIDING if slides and not rotates[i] else FULL for i in range(count)]
    return [kind + ("" if rotated else NOPE) for kind, rotated in zip(kinds, rotates, strict=False)]


def convolutions_between(config: Config) -> list[str]:
    """Short convolutions with full layers between them (LFM2; `full_attn_idxs` in older files)."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    count = config["num_hidden_layers"]
    attention = config.get("full_attn_idxs")
    return [FULL if attention is None or layer in attention else STATES[0] for layer in range(count)]


def linear_but_every_fourth(config: Config) -> list[str]:
    """Linear attention, and every fourth layer full (Qwen3-Next; the number is `full_attention_interval`)."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    every = config.get("full_attention_interval") or 4
    return [STATES[1] if (layer + 1) % every else FULL for layer in range(config["num_hidden_layers"])]


def _every(n: int, config: Config) -> list[str]:
    """`layer_types`, or else one full layer in n."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    return [SLIDING if (layer + 1) % n else FULL for layer in range(config["num_hidden_layers"])]


CACHE_KEYS = ("layer_types", "sliding_window", "attention_chunk_size")
"""Where transformers' caches look for what a layer may forget, whether or not its attention knows of it."""
_READ: dict[KindRule, tuple[str, ...]] = {
    full: (), windowed: ("sliding_window",), optional_window: ("sliding_window",),
}  # fmt: skip
"""Of the rules that leave some of these keys alone, those that they read."""


def strays(rule: KindRule, config: Config) -> list[str]:
    """Which of these keys a config.json has although models of this rule know nothing of them.

    A `layer_types` of another length is none: transformers refuses it, whether anybody reads it or not.
    """
    read, kinds = _READ.get(rule, CACHE_KEYS), config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) != config.get("num_hidden_layers"):
        read = (*read, "layer_types")
    return [key for key in CACHE_KEYS if key not in read and config.get(key) is not None]
