"""What tells that stored weights are not those of the model: they are packed, or to be multiplied. Imports no torch."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import InputError
from .headers import FLOATING, TensorInfo

_OF_TENSOR = re.compile(r"(_scale_inv|_scale_2|_global_scale|_scales?|_zero_point|\.absmax)$")
_OF_MODULE = ("scale", "scales", "SCB")
_BUFFERS = re.compile(r"(^|\.)(position_ids|masked_bias|attn\.bias)$")
"""Tables of whole numbers that old checkpoints store and nobody reads: no sign of packed weights."""
_FIX = "Use the unquantised checkpoint of this model, or a GGUF file, which is dequantised."


def refuse_packed(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise InputError if config.json, or the type of any tensor, says that weights are quantised."""
    packed = [name for name, info in tensors.items() if info.dtype not in FLOATING and not _BUFFERS.search(name)]
    settings = config.get("quantization_config")
    if settings is None and not packed:
        return
    signs, fix = [], _FIX
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        signs.append("config.json has a quantization_config" + (f" ({str(method)[:100]})" if method else ""))
    if packed:
        signs.append(f"{min(packed)[:200]} holds {tensors[min(packed)].dtype}")
    else:
        fix += " If the weights are ordinary ones again, take quantization_config out of config.json."
    raise InputError(
        "The model's weights are quantised",
        why=f"{' and '.join(signs)}: packed numbers cannot be pooled or fitted.",
        fix=fix,
    )


def refuse_scales(unused: Collection[str], stored: Collection[str]) -> None:
    """Raise InputError if a tensor that the model has no place for says by what another one is to be multiplied.

    Scales of activations and of the cache (`input_scale`, `k_scale`) are none of these: weights are right without.

    Args:
        unused: names of what no model reads; those that transformers has renamed tell only that there are some.
        stored: names of all that is stored.
    """
    renamed = any(name not in stored and _scaled(name) for name in unused)
    scales = {name: weight for name in (stored if renamed else unused) if (weight := _scaled(name)) in stored}
    if scales:
        name = min(scales)
        more = f", and {len(scales) - 1} others are alike" if len(scales) > 1 else ""
        raise InputError(
            f"The model's weights are quantised: {name} says by what {scales[name]} is to be multiplied{more}",
            why="config.json has no quantization_config, so transformers would load the weights without their scales.",
            fix=f"{_FIX} If the weights are ordinary ones again, take the scales out of the files.",
        )


def _scaled(name: str) -> str:
    """The weight that a tensor of this name would be a scale of."""
    module, _, own = name.rpartition(".")
    if own in _OF_MODULE:
        return f"{module}.weight"
    weight = _OF_TENSOR.sub("", name)
    return weight if weight != name else ""
