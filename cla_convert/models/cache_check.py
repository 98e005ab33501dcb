"""What `verify --cache` runs in a clean process: `python -P cache_check.py FOLDER...` prints one JSON line per folder.

Nothing of this package is imported, and nothing can be. The caches are transformers' own, filled by the model and
counted tensor by tensor.
"""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache, StaticCache

sys.modules["cla_convert"] = None  # type: ignore[assignment]

TOKENS = 256


def check(folder: str) -> dict[str, Any]:
    """Bytes of every layer in a cache that grows, and in one that is allocated at once."""
    model = loaded(folder)
    config = model.config.get_text_config()
    tokens = min(TOKENS, config.max_position_embeddings)
    ids = torch.arange(tokens)[None] % config.vocab_size
    layers = {}
    caches = {"dynamic": DynamicCache(config=config), "static": StaticCache(config=config, max_cache_len=tokens)}
    for name, cache in caches.items():
        with torch.inference_mode():
            model(ids, past_key_values=cache, use_cache=True)
        layers[name] = [_bytes(layer) for layer in cache.layers]
    sources = list(getattr(config, "kv_source_layers", range(config.num_hidden_layers)))
    return {"tokens": tokens, "layers": layers, "kv_source_layers": sources}


def loaded(folder: str) -> Any:
    """The model; of one that sees images transformers may know no class that only reads."""
    settings: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float32}
    try:
        return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    except ValueError:
        return AutoModelForImageTextToText.from_pretrained(folder, **settings).eval()


def _bytes(layer: Any) -> int:
    """Bytes that a layer's tensors keep alive, whatever they are views of."""
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))  # a hybrid has layers without
    held = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}.values())


for argument in sys.argv[1:]:
    print(json.dumps(check(argument)), flush=True)
