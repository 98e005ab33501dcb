"""How a GGUF file scales its rotary embedding, as `rope_parameters` of a config.json. Imports no torch.

llama.cpp keeps this in two places: metadata under `<arch>.rope.scaling.`, and tensors of one factor per frequency
(`rope_freqs.weight` of Llama 3, `rope_factors_long.weight` and `rope_factors_short.weight` of LongRoPE). Its rules:
https://github.com/ggml-org/llama.cpp (src/llama-model.cpp, ggml's rope, convert_hf_to_gguf.py).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTOR_TENSORS = (FREQUENCIES, LONG, SHORT)
_EXACT = 1e-5
"""Relative: factors are float32, and the steepest of them is as much as 32 times less exact than its frequency."""

Json = dict[str, Any]


def rope_parameters(
    scaling: Mapping[str, Any], factors: Mapping[str, np.ndarray], *, theta: float, dimensions: int, context: int
) -> Json:
    """What config.json says of the rotation.

    Args:
        scaling: metadata below `<arch>.rope.scaling.`, all of which must have a meaning here.
        factors: contents of the factor tensors that the file has.
        theta: base of the frequencies.
        dimensions: channels of a head that rotate.
        context: `<arch>.context_length`.

    Raises:
        InputError: naming the key or tensor that cannot be said in a config.json.
    """
    left = {key: value for key, value in scaling.items() if key != "finetuned"}
    kind = left.pop("type", "linear" if "factor" in left else "none")  # linear is llama.cpp's default
    if LONG in factors or SHORT in factors:
        found = _longrope(left, factors, "longrope" if kind == "none" else kind, context)
    elif FREQUENCIES in factors:
        found = _by_frequency(factors[FREQUENCIES], kind, left.pop("factor", 1.0), theta, dimensions)
    elif kind == "yarn":
        found = _yarn(left, context)
    elif kind == "linear" and left.get("factor", 1.0) not in (0.0, 1.0):
        found = {"rope_type": "linear", "factor": left.pop("factor")}
        left.pop("original_context_length", None)
    elif kind in ("linear", "none"):
        found = {"rope_type": "default"}
        left = {key: value for key, value in left.items() if key not in ("factor", "original_context_length")}
    else:
        raise _refused("rope.scaling.type", f"It is {kind!r}, which a config.json cannot say without more.")
    for key, value in left.items():
        if key not in _NEUTRAL or value != _NEUTRAL[key]:
            raise _refused(
                f"rope.scaling.{key}", f"It is {value!r}, and has no meaning with {found['rope_type']} RoPE."
            )
    return {**found, "rope_theta": theta}


_NEUTRAL = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}
"""Values that change nothing."""


def _yarn(left: Json, context: int) -> Json:
    factor = left.pop("factor", None)
    if not factor:
        raise _refused("rope.scaling.factor", "YaRN needs it.")
    found: Json = {"rope_type": "yarn", "factor": factor}
    found["original_max_position_embeddings"] = left.pop("original_context_length", context)
    for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if theirs in left:
            found[ours] = left.pop(theirs)
    attention = left.pop("attn_factor", 1.0) * left.pop("yarn_attn_factor", 1.0)
    if attention != 1.0:  # on top of what YaRN does by itself
        found["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return found


def _longrope(left: Json, factors: Mapping[str, np.ndarray], kind: str, context: int) -> Json:
    if missing := {LONG, SHORT} - factors.keys():
        raise _refused(min(missing), "LongRoPE has both, and this file has only the other one.")
    if kind not in ("longrope", "linear") or left.pop("factor", 1.0) != 1.0 or FREQUENCIES in factors:
        raise _refused("rope.scaling.type", f"It is {kind!r} beside {LONG}.")
    original = left.pop("original_context_length", context)
    return {
        "rope_type": "longrope",
        "long_factor": [float(value) for value in factors[LONG]],
        "short_factor": [float(value) for value in factors[SHORT]],
        "original_max_position_embeddings": original,
        "factor": max(1.0, context / original),
        "attention_factor": left.pop("attn_factor", 1.0),
    }


def _by_frequency(wanted: np.ndarray, kind: str, factor: float, theta: float, dimensions: int) -> Json:
    """The llama3 (or linear) scaling that gives these factors."""
    if kind == "yarn" or factor not in (0.0, 1.0):
        raise _refused(
            FREQUENCIES, f"There is rope.scaling.type {kind!r} beside it, and a config.json holds one of them."
        )
    if wanted.shape != (dimensions // 2,):
        raise _refused(FREQUENCIES, f"It has {wanted.size} factors for {dimensions // 2} frequencies.")
    wanted = wanted.astype(np.float64)
    if np.ptp(wanted) == 0:
        one = wanted[0] == 1
        return {"rope_type": "default"} if one else {"rope_type": "linear", "factor": float(wanted[0])}
    wavelengths = 2 * math.pi * theta ** (np.arange(0, dimensions, 2) / dimensions)
    for found in _candidates(wanted, wavelengths):
        if np.allclose(llama3_factors(found, wavelengths), wanted, rtol=_EXACT, atol=0):
            return {"rope_type": "llama3", **found}
    raise _refused(FREQUENCIES, "Its factors are not those of Llama 3's RoPE scaling.")


def llama3_factors(scaling: Mapping[str, float], wavelengths: np.ndarray) -> np.ndarray:
    """What Llama 3 divides each frequency by."""
    factor, low, high = (scaling[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = scaling["original_max_position_embeddings"]
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelengths < original / high, 1.0, np.where(wavelengths > original / low, factor, between))


def _candidates(wanted: np.ndarray, wavelengths: np.ndarray) -> list[dict[str, float]]:
    """Scalings that may be meant: those of the released models, and the one that two factors in between determine.

    Of the last three parameters only two ratios count, so low_freq_factor is taken for 1.
    """
    factor = _rounded(float(wanted.max()))
    usual = [
        {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 2**n}
        for n in (13, *range(4, 21))
    ]
    between = (wanted > 1 + _EXACT) & (wanted < wanted.max() * (1 - _EXACT))
    if between.sum() < 2:
        return usual
    smooth = (1 / wanted[between] - 1 / factor) / (1 - 1 / factor)
    (slope, offset), *_ = np.linalg.lstsq(
        np.stack([1 / wavelengths[between], -np.ones(between.sum())], 1), smooth, rcond=None
    )
    if slope <= 0 or offset <= 0:
        return usual
    high, original = 1 + 1 / offset, slope / offset
    solved = {"factor": factor, "low_freq_factor": 1.0}
    rounded = {"high_freq_factor": _rounded(high), "original_max_position_embeddings": round(original)}
    exact = {"high_freq_factor": high, "original_max_position_embeddings": original}
    return [*usual, solved | rounded, solved | exact]


def _rounded(value: float) -> float:
    """A number without the noise of float32."""
    near = round(value, 2)
    return near if abs(near - value) < 1e-4 * value else value


def _refused(name: str, why: str) -> InputError:
    return InputError(
        f"The GGUF file scales its RoPE in a way that cannot be read: {name}",
        why=why,
        fix="Use the safetensors checkpoint of this model.",
    )
