"""Model FLOPs: what a step needs whatever the implementation, and what share of the hardware's peak that is (MFU).

After PaLM, appendix B (arXiv 2204.02311): a token costs 2 FLOPs a parameter in the forward pass and twice that in the
backward pass, and attention over T positions another 12 L H Q T in all (H heads of Q channels in L layers). Recomputed
activations do not count, the teacher's forward pass does, and so does what freezing saves.
"""

import re
from typing import Any

import torch

PEAK_BFLOAT16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bfloat16 FLOP/s with float32 accumulation, from NVIDIA's data sheets; the first name found in a device's."""


def peak_flops(device: str, compute: torch.dtype) -> float | None:
    """Peak FLOP/s of a device in this dtype; None where it is not in the table."""
    if not device.startswith("cuda") or compute is not torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_BFLOAT16.items() if re.search(rf"\b{known}\b", name)), None)


def forward_flops(model: Any, length: int) -> float:
    """FLOPs of one token's forward pass in a sequence of `length`."""
    matrices = {p: p.numel() for p in model.parameters() if p.ndim >= 2}
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        matrices.pop(model.get_input_embeddings().weight)  # looked up, not multiplied
    return 2 * sum(matrices.values()) + _attention_flops(model.config, length)


def training_flops(student: Any, teacher: Any | None, length: int) -> float:
    """FLOPs of training on one token: forward, backward, and the teacher's forward pass."""
    forward = forward_flops(student, length)
    frozen = sum(p.numel() for p in student.parameters() if p.ndim >= 2 and not p.requires_grad)
    return 3 * forward - 2 * frozen + (0 if teacher is None else forward_flops(teacher, length))


def _attention_flops(config: Any, length: int) -> float:
    heads = config.num_attention_heads
    channels = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 4 * config.num_hidden_layers * heads * channels * length
