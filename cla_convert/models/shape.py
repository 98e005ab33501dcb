"""What a config.json says about a model's attention. Imports no torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError
from .families import FAMILIES
from .kinds import SLIDING, has_kv

_LARGEST = {"num_hidden_layers": 10_000, "num_attention_heads": 100_000, "num_key_value_heads": 100_000}
"""Beyond these a config.json is not one: lists of a billion layers would fill the memory before anything is refused."""

SharingMap = tuple[int | None, ...]
"""Per layer whose K/V it reads, its own or an earlier one's; None for a layer that has neither (of a hybrid)."""


def owners_of(sources: Iterable[int | None]) -> list[int]:
    """The layers that keep K/V under a map, in order."""
    return sorted({source for source in sources if source is not None})


def unshared(kinds: Sequence[str]) -> list[int | None]:
    """The map in which no layer reads another's K/V."""
    return [layer if has_kv(kind) else None for layer, kind in enumerate(kinds)]


@dataclass(frozen=True)
class AttentionShape:
    """What conversion needs to know about a model, read from its config.json."""

    model_type: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    kinds: tuple[str, ...]
    """Attention kind of each layer; only layers of one kind may share."""
    kv_source_layers: SharingMap
    """Map of the model as it stands: every layer with keys and values its own, unless it already shares."""
    sliding_window: int | None = None
    """Tokens that a sliding layer sees, itself included; None without sliding layers."""
    gated: bool = False
    """Whether the projection of the queries holds gates, too."""
    state_bytes_each: tuple[int, int] = (0, 0)
    """Of what a layer without keys and values keeps of a text: bytes, and numbers of the cache's dtype."""

    @property
    def kv_layers(self) -> list[int]:
        """Layers that have attention: all, except in hybrids."""
        return [layer for layer, kind in enumerate(self.kinds) if has_kv(kind)]

    def state_bytes(self, element_size: int) -> int:
        """Bytes that the layers without keys and values keep of one text, however long it is."""
        fixed, numbers = self.state_bytes_each
        return (self.num_layers - len(self.kv_layers)) * (fixed + numbers * element_size)

    @property
    def is_mha(self) -> bool:
        """Whether every query head has a KV head of its own."""
        return self.num_key_value_heads == self.num_attention_heads > 1

    @property
    def projection_rows(self) -> dict[str, int]:
        """Rows of q_proj, k_proj and v_proj."""
        keys = self.num_key_value_heads * self.head_dim
        queries = self.num_attention_heads * self.head_dim * (2 if self.gated else 1)
        return {"q_proj": queries, "k_proj": keys, "v_proj": keys}

    def kv_bytes_per_token(self, element_size: int, owners: int | None = None) -> int:
        """Bytes of K and V that one token adds to the cache, for `owners` layers (default: as the model stands)."""
        owners = len(owners_of(self.kv_source_layers)) if owners is None else owners
        return 2 * owners * self.num_key_value_heads * self.head_dim * element_size

    def kv_bytes(self, element_size: int, tokens: int, sources: Iterable[int | None]) -> int:
        """Bytes of the cache of a context under a map: sliding layers keep their window."""
        window = self.sliding_window or tokens
        kept = [
            min(tokens, window) if self.kinds[owner].startswith(SLIDING) else tokens for owner in owners_of(sources)
        ]
        return self.kv_bytes_per_token(element_size, 1) * sum(kept)


def shape_of(config: Mapping[str, Any]) -> AttentionShape:
    """Read the attention shape from a config.json, of a source or a CLA model. Raises InputError if a size is missing.

    A model of an unsupported family is described as far as the usual keys go.
    """
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type.removeprefix("cla_"))
    if family:
        renamed = {key: config[name] for key, name in family.keys.items() if name in config}
        config = {**family.defaults, **config, **renamed}
    try:
        layers, heads = _size(config, "num_hidden_layers"), _size(config, "num_attention_heads")
        hidden = _size(config, "hidden_size")
        kinds = family.kinds(config) if family else config.get("layer_types") or ["full_attention"] * layers
        named = config.get("layer_types")  # of a family of one kind, too: transformers counts it
        kinds = named if isinstance(named, list) and len(named) != layers else kinds
        if len(kinds) != layers or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(f"layer_types tells the kind of {len(kinds)} layers, not of {layers}")
        slides = any(kind.startswith(SLIDING) for kind in kinds) and config.get("sliding_window") is not None
        return AttentionShape(
            model_type=model_type,
            hidden_size=hidden,
            num_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=_size(config, "num_key_value_heads", heads),
            head_dim=_size(config, "head_dim", hidden // heads),
            kinds=tuple(kinds),
            kv_source_layers=_map(config, kinds) if family else _published_map(config, kinds),
            sliding_window=_size(config, "sliding_window") if slides else None,
            gated=bool(family and family.gated),
            state_bytes_each=family.state(config) if family and family.state else (0, 0),
        )
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(
            "config.json does not describe a decoder-only transformer",
            why=f"A size is missing or does not fit: {error}"[:500],
        ) from error


LONG = 32_768
"""Tokens of a long context."""


def long_cache(
    config: Mapping[str, Any], element_size: int, sources: Iterable[int | None], heads: tuple[int, int]
) -> dict[str, int] | None:
    """The cache of a long context, where windows make it another than the bytes of its first tokens say.

    `heads`: KV heads before and after.

    Returns:
        window: of the sliding layers; tokens: of the context, at most the positions that the model knows; before and
        after: bytes of a cache for every layer, and under the map. None without sliding layers that ever are full.
    """
    shape, tokens = shape_of(config), min(LONG, positions_of(config) or LONG)
    if shape.sliding_window is None or shape.sliding_window >= tokens:
        return None
    maps = (shape.kv_layers, sources)
    before, after = (
        replace(shape, num_key_value_heads=count).kv_bytes(element_size, tokens, one)
        for count, one in zip(heads, maps, strict=True)
    )
    return {"window": shape.sliding_window, "tokens": tokens, "before": before, "after": after}


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number above 0 that could be one. Raises KeyError, ValueError."""
    value = config[key] if default is None else config.get(key) or default
    if type(value) is not int or not 0 < value <= _LARGEST.get(key, 2**31):
        raise ValueError(f"{key} is {value!r}")
    return value


def _published_map(config: Mapping[str, Any], kinds: Sequence[str]) -> SharingMap:
    """Of a family that shares by itself (Gemma 3n, Gemma 4): the last layers read the last owner of their kind.

    Raises ValueError if there is none.
    """
    layers, readers = len(kinds), config.get("num_kv_shared_layers")
    if type(readers) is not int or not 0 < readers < layers:
        return _map(config, kinds)
    owners = kinds[: layers - readers]
    last = {kind: layer for layer, kind in enumerate(owners)}
    if missing := set(kinds) - last.keys():
        raise ValueError(f"num_kv_shared_layers is {readers}, and no layer before has {min(missing)}")
    return (*range(len(owners)), *(last[kind] for kind in kinds[len(owners) :]))


def _map(config: Mapping[str, Any], kinds: Sequence[str]) -> SharingMap:
    """The map of a model that shares; of others, every layer its own. Raises ValueError for what is no map."""
    sources = config.get("kv_source_layers")
    found = tuple(sources or unshared(kinds))
    fits = len(found) == len(kinds) and all(
        type(source) is int and 0 <= source < len(kinds) if has_kv(kind) else source is None
        for source, kind in zip(found, kinds, strict=True)
    )
    if not fits:
        raise ValueError(f"kv_source_layers is {sources!r}")
    return found


def positions_of(config: Mapping[str, Any]) -> int | None:
    """How many positions the language model of a config.json was built for, if that says it."""
    return size_of(config, "max_position_embeddings") or size_of(config, "n_positions")


def size_of(config: Mapping[str, Any], name: str) -> int | None:
    """A size of the language model, which may be a part of a multimodal one."""
    text = config.get("text_config")
    found = (text if isinstance(text, dict) else config).get(name)
    return found if isinstance(found, int) else None
