"""RoPE whose frequencies depend on the length of a text: one choice for all that a server answers.

transformers chooses in every forward pass, by the largest position in it: LongRoPE (Phi-3) takes other frequencies
beyond the length that the model was trained with, dynamic NTK scaling stretches them with the length. A server has
parts of many texts in a pass, and keeps keys from one pass to the next, so that queries would meet keys of other
frequencies. vLLM's own classes choose once, by the longest text that is allowed; so do ours.
"""

from typing import Any

import torch

SETTLED = "settled"
"""A kind of RoPE that transformers computes nothing anew for."""


def settle_frequencies(model: torch.nn.Module, length: int) -> list[str]:
    """Give rotary embeddings the frequencies of a text of `length` tokens, for good; the kinds that there were."""
    settled: set[str] = set()
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and _depends(kinds):
            _settle(module, kinds, length)
            settled.add(kinds)
        elif isinstance(kinds, dict):  # by kind of layer
            for layer_type, kind in kinds.items():
                if kind is not None and _depends(kind):
                    _settle(module, kind, length, layer_type)
                    settled.add(kind)
    return sorted(settled)


def _depends(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _settle(module: Any, kind: str, length: int, layer_type: str | None = None) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    name = f"{layer_type}_inv_freq" if layer_type else "inv_freq"
    apart = {"layer_type": layer_type} if layer_type else {}
    device = module.get_buffer(name).device
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](module.config, device, seq_len=length, **apart)
    module.register_buffer(name, frequencies, persistent=False)
    if layer_type:
        module.rope_type[layer_type] = SETTLED
    else:
        module.rope_type = SETTLED
