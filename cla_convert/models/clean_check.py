"""What `verify` runs in a clean process: `python -P clean_check.py FOLDER...` prints one JSON line per folder.

Nothing of this package is imported, and as a script nothing can be: the code that ships in the folder is what loads.
"""

import inspect
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TEXT = "The quick brown fox jumps over the lazy dog."
DIGEST_OF = runpy.run_path(str(Path(__file__).with_name("probe.py")))["digest_of"]
LARGEST_WINDOW = 1024
"""Sliding windows up to this many tokens are checked beyond their end; larger ones would take minutes on a CPU."""


def check(folder: str) -> dict[str, Any]:
    """Load a model and compare what it computes in several ways."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.inference_mode():
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        found = compare(model, ids)
    return found | {
        "module": type(model).__module__,
        "transformers": transformers.__version__,
        "missing_keys": sorted(info["missing_keys"]),
        "unexpected_keys": sorted(info["unexpected_keys"]),
        "not_finite": sorted(name for name, tensor in model.state_dict().items() if not is_finite(tensor)),
        "tokenizer_digest": DIGEST_OF(tokenizer),
        "family_tokenizer_digest": DIGEST_OF(as_the_family_loads_it(folder, model.config.model_type)),
        "tokenizer_round_trip": reads_what_it_writes(tokenizer, ids[0]),
        "generated_tokens": new.shape[1] - ids.shape[1],
        "generated": tokenizer.decode(new[0, ids.shape[1] :]),
    }


def reads_what_it_writes(tokenizer: Any, ids: torch.Tensor) -> bool:
    """Whether what ids are written as is read and written alike again.

    Not whether it is the text that was read: tokenizers without capitals, or without some signs, lose those by nature.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether it holds neither NaN nor infinity. A token or an expert that the probe does not meet would hide them."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())  # NaN wins; needs no memory


def as_the_family_loads_it(folder: str, model_type: str) -> Any:
    """The tokenizer that AutoTokenizer would load if this were a model of the family that was converted."""
    config = AutoConfig.for_model(model_type.removeprefix("cla_"))
    return AutoTokenizer.from_pretrained(folder, config=config)


def compare(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Logits without a cache, with one, and token by token at the end; what the cache holds."""
    ids = beyond_the_window(model, ids)
    name = cache_argument(model)
    full = model(ids, use_cache=False).logits
    cached = model(ids, use_cache=True).logits
    cache: Any = None
    steps = []
    start = max(0, ids.shape[1] - 24)
    for part in [slice(0, start)] * bool(start) + [slice(i, i + 1) for i in range(start, ids.shape[1])]:
        out = model(ids[:, part], **{name: cache}, use_cache=True)
        cache = out[name]
        steps.append(out.logits)
    keys_and_values = ([getattr(layer, name, None) for name in ("keys", "values")] for layer in cache.layers)
    held = [sum(t.nbytes for t in tensors if t is not None) for tensors in keys_and_values]
    sources = getattr(model.config.get_text_config(), "kv_source_layers", range(len(held)))
    owners = sorted({source for source in sources if source is not None})  # a hybrid has layers without K/V
    return {
        "tokens": ids.shape[1],
        "cached_difference": (full - cached).abs().max().item(),
        "stepwise_difference": (full - torch.cat(steps, 1)).abs().max().item(),
        "logits_finite": bool(full.isfinite().all()),
        "largest_logit": full.abs().max().item(),
        "owners": len(owners),
        "cached_layers": sum(size > 0 for size in held),
        "owners_only": [layer for layer, size in enumerate(held) if size] == owners,
        "cache_bytes": sum(held),
        "layer_bytes": held,
    }


def cache_argument(model: Any) -> str:
    """What the installed transformers calls the KV cache, where models take it and in what they return.

    Raises:
        RuntimeError: by none of the names that are known.
    """
    parameters = inspect.signature(type(model).forward).parameters
    names = [name for name in ("cache", "past_key_values") if name in parameters]  # before 5.24 it was the latter
    if len(names) != 1:
        raise RuntimeError(f"{type(model).__name__}.forward takes a KV cache by neither name: {', '.join(parameters)}")
    return names[0]


def beyond_the_window(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The tokens, repeated until a sliding window (if there is one) has to let go of some."""
    cache = model(ids, use_cache=True)[cache_argument(model)]
    sliding = any(getattr(layer, "is_sliding", False) for layer in cache.layers)
    config = model.config.get_text_config()
    if not sliding or config.sliding_window > LARGEST_WINDOW:
        return ids
    repeats = 2 + config.sliding_window // ids.shape[1]
    return ids.repeat(1, repeats)[:, : config.max_position_embeddings]


if __name__ == "__main__":
    sys.modules["cla_convert"] = None  # type: ignore[assignment]
    for argument in sys.argv[1:]:
        print(json.dumps(check(argument)), flush=True)
