"""What the arithmetic runs in. Weights and optimiser state are float32 in any case."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..environment import has_native_bfloat16
from ..models.export import stays_float32


@dataclass(frozen=True)
class Precision:
    """Compute dtype on a device."""

    device_type: str
    compute: torch.dtype
    tf32: bool = False
    """Whether float32 matrix products may round their factors to 10 bits (NVIDIA's TF32)."""

    @property
    def name(self) -> str:
        """`float32`, `tf32` or `bfloat16`."""
        return "tf32" if self.tf32 else str(self.compute).removeprefix("torch.")

    @contextmanager
    def products(self) -> Iterator[None]:
        """Matrix products as the precision has them."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else before)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    @contextmanager
    def working_copy(self, model: nn.Module) -> Iterator[None]:
        """Let `model` compute with a copy of its weights in the compute dtype; gradients reach the float32 weights.

        The copy is made once, by a differentiable cast: entered around all micro-batches of a step, each of them adds
        its gradient to the float32 one. Unlike autocast, which casts at every use and leaves the residual stream in
        float32, everything between the embedding and the logits is in the compute dtype (as FSDP2's mixed precision
        has it). The backward passes belong inside: recomputed activations read the weights again.
        """
        parameters = ((m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None)
        originals = [(m, name, p) for m, name, p in parameters if p.requires_grad]  # others: `cast_frozen`
        casts = {p: p.to(self.compute) for _, _, p in originals}  # tied weights stay tied: one cast each
        for module, name, parameter in originals:
            module._parameters[name] = casts[parameter]  # type: ignore[assignment]
        try:
            with self.products():
                yield
        finally:
            for module, name, parameter in originals:
                module._parameters[name] = parameter


@torch.no_grad()
def cast_frozen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep what is not trained in the compute dtype: it needs no float32 copy, and a teacher can share it.

    But for what is float32 in the teacher, too.
    """
    kept = stays_float32(model, dtype)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not kept.search(name):
            parameter.data = parameter.data.to(dtype)


def choose_precision(wanted: Literal["auto", "bfloat16", "tf32", "float32"], device: str) -> Precision:
    """`auto` takes bfloat16 where the hardware multiplies it natively; emulated, it is slower than float32."""
    device_type = torch.device(device).type
    if wanted == "auto":
        wanted = "bfloat16" if has_native_bfloat16(device_type) else "float32"
    if wanted == "tf32":
        return Precision(device_type, torch.float32, tf32=True)
    return Precision(device_type, getattr(torch, wanted))
