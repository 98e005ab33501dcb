"""Which attention layer of a server reads whose KV cache. Imports neither torch nor vLLM."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..errors import InputError
from ..models.kinds import SLIDING
from ..models.shape import shape_of
from ..models.whole_rows import WHOLES

CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")
"""Formats of the KV cache in which a layer's scales, if it has any, are two numbers that a consumer can be given."""


def owner_name(name: str, layer: int, source: int) -> str:
    """The name of layer `source`, in the way that `name` names layer `layer`.

    Servers name layers as they like: `model.layers.3.self_attn.attn`, `model.h.3.attn.attn` or `3.attn`.

    Raises:
        InputError: the layer's number is not in its name exactly once, so that the owner's name cannot be told; or the
            layer would be its own owner, which a server would take as no sharing at all.
    """
    parts = name.split(".")
    places = [place for place, part in enumerate(parts) if part.isdecimal()]
    if [parts[place] for place in places] != [str(layer)]:
        raise InputError(
            f"The attention of layer {layer} is called {name!r}",
            why="Its owner's name cannot be told from that.",
            fix="Use a version of vLLM that docs/serving.md lists.",
        )
    if source == layer:
        raise InputError(f"Layer {layer} ({name}) cannot share the KV cache of itself")
    parts[places[0]] = str(source)
    return ".".join(parts)


def layer_of(name: str) -> int:
    """The number in a layer's name. Raises InputError if there is not exactly one."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise InputError(f"An attention layer is called {name!r}, which does not tell its number")
    return numbers[0]


def windows_of(config: Mapping[str, Any]) -> list[int | None]:
    """The tokens that each layer sees, itself included; None where that is all. Raises InputError as `shape_of`."""
    shape = shape_of(config)
    return [shape.sliding_window if kind.startswith(SLIDING) else None for kind in shape.kinds]


def check_language_model(model_type: str) -> None:
    """Refuse a model that sees images around a language model. Raises InputError."""
    if whole := WHOLES.get(model_type.removeprefix("cla_")):
        raise InputError(
            f"vLLM does not serve {whole.name} with Cross-Layer Attention",
            why="It is the whole model, and the plugin knows language models.",
            fix="Convert with --text-only (source.text_only), or serve it with transformers.",
        )


def check_attends(sources: Sequence[int | None]) -> None:
    """Refuse a hybrid: its layers without attention keep states. Raises InputError."""
    if without := sum(source is None for source in sources):
        raise InputError(
            f"vLLM cannot serve this model: {without} of its {len(sources)} layers have no attention",
            why="Converted models run on its Transformers backend, which refuses layers that do not attend.",
            fix="Serve it with transformers (python -m cla_convert.transformers_cli serve), or serve the source model.",
        )


def check_stages(sources: Sequence[int], bounds: Sequence[int]) -> None:
    """Refuse a pipeline that parts a consumer from its owner: K/V do not travel between stages.

    Args:
        sources: `kv_source_layers` of the model.
        bounds: where stages begin, and the number of layers: [0, 15, 30] for two stages.

    Raises:
        InputError: naming the layer, and where stages may begin.
    """
    for begin, end in pairwise(bounds):
        for layer in range(begin, end):
            if sources[layer] < begin:
                allowed = [at for at in range(1, len(sources)) if all(source >= at for source in sources[at:])]
                raise InputError(
                    f"The pipeline stage of layers {begin} to {end - 1} lacks layer {sources[layer]}, whose keys and "
                    f"values layer {layer} reads",
                    fix=f"Stages may begin at layers {', '.join(map(str, allowed))}: name the number of layers of each "
                    "in VLLM_PP_LAYER_PARTITION."
                    if allowed
                    else "Use tensor parallelism: with this sharing map, no stage may begin after the first layer.",
                )


def check_cache_dtype(dtype: str, skipped: Iterable[str] = ()) -> None:
    """Refuse formats of the KV cache whose kernels keep scales by layer, and formats of single layers.

    Args:
        dtype: --kv-cache-dtype.
        skipped: --kv-cache-dtype-skip-layers.

    Raises:
        InputError: either of them.
    """
    if dtype not in CACHE_DTYPES:
        raise InputError(
            f"--kv-cache-dtype {dtype} does not fit Cross-Layer Attention",
            why="vLLM's kernels for it keep scales by layer, and a consumer has none of the cache that it reads.",
            fix=f"Use one of {', '.join(CACHE_DTYPES)}.",
        )
    if numbers := [name for name in skipped if name.isdecimal()]:
        raise InputError(
            f"--kv-cache-dtype-skip-layers {' '.join(numbers)} does not fit Cross-Layer Attention",
            why="Where layers keep caches of several formats, vLLM does not find the owner's format for a consumer.",
            fix="Leave it out, or use another --kv-cache-dtype.",
        )


def copies_of_heads(heads: int, processes: int) -> int:
    """How many tensor-parallel processes hold the same KV head: one, unless there are more processes than heads.

    Raises InputError if neither number divides the other.
    """
    if heads % processes == 0:
        return 1
    if processes % heads:
        raise InputError(
            f"{heads} KV heads cannot be spread over {processes} processes",
            why="Each needs as many as the others, or a copy of one.",
            fix=f"Use a --tensor-parallel-size that divides {heads}, or that {heads} divides.",
        )
    return processes // heads


def gain(layers: int, owners: int, heads: int, source_heads: int, head_bytes: int) -> str:
    """What a process keeps of a token, in words, and how many times the source's tokens the same memory holds.

    Args:
        layers, owners: all layers of the process, and those with keys and values.
        heads, source_heads: KV heads of a layer in this process, and what they are in the source model.
        head_bytes: of the key and the value of one head.
    """
    fewer = f"; KV heads: {heads} instead of {source_heads}" if heads < source_heads else ""
    return (
        f"{owners} of {layers} layers keep keys and values, the others read theirs{fewer}; "
        f"{owners * heads * head_bytes:,} bytes a token: the same memory holds "
        f"{layers * source_heads / (owners * heads):.2f}x the tokens."
    )
