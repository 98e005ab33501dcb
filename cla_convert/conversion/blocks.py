"""One decoder layer at a time, out of the shipped CLA classes, split where calibration needs it.

An attention layer is used as `heads` (normed input -> concatenated heads) followed by its output projection. What the
layer is told about positions and masks is what `Skeleton` saw the whole model tell it.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..environment import has_native_bfloat16
from ..errors import InputError
from ..models.kinds import NOPE, has_kv
from ..models.shape import shape_of, unshared
from .group_fit import HeadShape
from .pieces import Pieces
from .skeleton import Skeleton, Source

_READERS = 8
"""Threads that read a layer for a GPU: one copies from memory slower than a GPU takes."""
_GPU_BATCH, _CPU_BATCH = 32_768, 2048
"""Tokens that run through a layer at a time: fill a GPU, stay in a CPU's caches."""

Passage = Callable[[Tensor], Tensor]
"""The residual stream [rows, T, hidden] that a layer reads -> the one behind it."""

SharedKV = dict[int, tuple[Tensor, Tensor]]
"""Owner -> its post-RoPE keys and values, [rows, KV heads, T, D] each: what consumers read."""


class Factory:
    """Builds the layers of one model on one device."""

    def __init__(
        self,
        source: Source,
        config: dict[str, Any],
        tokens: Tensor,
        device: str,
        dtype: torch.dtype | None = None,
        kv_heads: int | None = None,
    ) -> None:
        """Read the config. Raises InputError for a family that is not supported, or stored in other pieces.

        Args:
            source: where weights are read from.
            config: config.json of the source model.
            tokens: every row that will be looked at, int64 [rows, T].
            device: where layers live and run.
            dtype: of matrix products; weights and residual streams stay float32. Default: `matmul_dtype`.
            kv_heads: what layers of the converted model have. Default: as many as the source's.
        """
        self.device, self.dtype = torch.device(device), dtype or matmul_dtype(device)
        self.batch = _GPU_BATCH if self.device.type == "cuda" else _CPU_BATCH
        """Tokens at a time."""
        self.skeleton = Skeleton(source, config, tokens, self.device)
        self.source, self.family, self.config = source, self.skeleton.family, self.skeleton.config
        self._pieces = Pieces(self.family.cla_type)
        self._check_names()
        self._attention = shape_of(config)
        self.kv_heads = kv_heads or self._attention.num_key_value_heads
        self._calls = [_for_layers(call, self.dtype, self.device) for call in self.skeleton.calls]

    def on(self, device: str) -> "Factory":
        """The same on another device; embeddings and head stay where they are."""
        other = copy.copy(self)
        other.device = torch.device(device)
        other._calls = [_for_layers(call, self.dtype, other.device) for call in self._calls]
        return other

    def _check_names(self) -> None:
        """Everything that a layer runs on must be there, whole or in pieces."""
        names = self._empty(0, self.config).state_dict().keys()
        stored = {self._pieces.whole(name) for name in self.source.tensors}
        if missing := [n for n in names if f"{self.family.layers}.0.{n}" not in stored]:
            raise InputError(
                f"--init calibrated does not support this checkpoint of type {self.family.model_type!r}",
                why=f"Its layers are stored in other pieces than they run in: {missing[0]} is not there.",
                fix="Use --init mean and uptrain for longer.",
            )

    @property
    def pools_heads(self) -> bool:
        """Whether the converted model has fewer KV heads: then layers that share with no other are pooled, too."""
        return self.kv_heads < self._attention.num_key_value_heads

    def load(self, stream: Tensor) -> Tensor:
        """A part of a residual stream as layers take it: on the device, float32 only there: it moves half."""
        return stream.to(self.device).float()

    def attends(self, layer: int) -> bool:
        """Whether a layer has keys and values: some of a hybrid have not."""
        return has_kv(self._attention.kinds[layer])

    def head_shape(self, layer: int) -> HeadShape:
        """Sizes of a layer's attention in the source."""
        positions = self._calls[layer].get("position_embeddings")
        turned = 0 if positions is None or self._attention.kinds[layer].endswith(NOPE) else positions[0].shape[-1]
        turned *= 2 if self.family.half_tables else 1
        heads, kv_heads = self._attention.num_attention_heads, self._attention.num_key_value_heads
        return HeadShape(heads, kv_heads, self._attention.head_dim, turned, self.family.gated)

    def read_layer(self, index: int, *, mlp: bool = True) -> dict[str, Tensor]:
        """Weights of a layer in float32, by their name inside the layer."""
        prefix = f"{self.family.layers}.{index}."
        stored = (name for name in self.source.tensors if name.startswith(prefix))
        names = [name for name in stored if mlp or f".{self.family.mlp}." not in self._pieces.whole(name)]
        readers = _READERS if self.device.type == "cuda" else 1  # a CPU has no room for several tensors at once
        with ThreadPoolExecutor(readers) as pool:
            weights = dict(zip(names, pool.map(self._read, names), strict=True))
        return {name.removeprefix(prefix): weight for name, weight in self._pieces.assemble(weights).items()}

    def _read(self, name: str) -> Tensor:
        """A copy, because weights are trained in place. It becomes float32 on the device: that moves half the bytes."""
        stored = self.source.read(name)
        return stored.to(self.device).to(torch.float32, copy=self.device.type == "cpu")

    def build(
        self, index: int, weights: Mapping[str, Tensor], group: Sequence[int] = (), *, training: bool = False
    ) -> "Block":
        """A runnable layer from `read_layer`'s weights (without the mlp: only its attention runs).

        In a `group` (owner first; perhaps of one) the layer is one of the converted model's, its owner or a consumer;
        without one, the source's. Vectors stay float32 and so do, if they are to be trained, the matrices.
        """
        config = copy.copy(self.config)
        if group and self.pools_heads:
            setattr(config, self.family.key("num_key_value_heads"), self.kv_heads)
        config.kv_source_layers = [
            group[0] if layer in group else own for layer, own in enumerate(unshared(self._attention.kinds))
        ]
        layer = self._empty(index, config)
        cast = {n: w if training or w.dim() < 2 else w.to(self.dtype) for n, w in weights.items()}
        layer.load_state_dict(cast, strict=False, assign=True)
        return Block(layer.requires_grad_(False), self, self._calls[index], self.head_shape(index))

    def passage(self, index: int, weights: Mapping[str, Tensor] | None = None) -> "Passage":
        """What moves residual streams past a layer of the source; `weights` if they have been read already."""
        weights = self.read_layer(index) if weights is None else weights
        if self.attends(index):
            block = self.build(index, weights)
            return lambda hidden: block.past(hidden, {})
        layer = self._empty(index, self.config)
        layer.load_state_dict(weights, strict=False, assign=True)  # float32, because a recurrence adds up errors
        layer.requires_grad_(False)

        def past(hidden: Tensor) -> Tensor:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                return layer(hidden, **self._calls[index])

        return past

    def _empty(self, index: int, config: Any) -> Any:
        with torch.device("meta"):
            return self.skeleton.layer_class(config, index).eval()


class Block:
    """A decoder layer on float32 residual streams [rows, T, hidden]."""

    def __init__(self, layer: Any, factory: Factory, call: dict[str, Any], shape: HeadShape) -> None:
        self.family, self._factory, self._call, self.shape = factory.family, factory, call, shape
        norms = (layer.get_submodule(name) if name else None for name in self.family.norms)
        self._norm_in, self._norm_mid, self._norm_attention, self._norm_mlp = norms
        self._multiplier = getattr(layer, "residual_multiplier", 1.0)
        self._mlp, self.attention = (layer.get_submodule(name) for name in (self.family.mlp, self.family.attention))
        self.output: nn.Linear = getattr(self.attention, self.family.o_proj)
        setattr(self.attention, self.family.o_proj, nn.Identity())

    def precision(self) -> torch.autocast:
        """Context of all matrix products: casts the float32 weights of a layer in training."""
        dtype = self._factory.dtype
        return torch.autocast(self._factory.device.type, dtype, enabled=dtype != torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the layer runs."""
        return self._factory.device

    @property
    def channel_order(self) -> Tensor:
        """Channels of a head, those of a rotary pair in the two halves of its rotary part, as most families have."""
        channels = torch.arange(self.shape.head_dim)
        if self.family.adjacent_pairs:
            rotary = self.shape.rotary_dim
            channels[:rotary] = channels[:rotary].unflatten(0, (-1, 2)).T.flatten()
        return channels

    def norm_in(self, hidden: Tensor) -> Tensor:
        """Attention input x; normed where the family does that."""
        return self._norm_in(hidden) if self._norm_in else hidden

    def view(self, residual: Tensor) -> Tensor:
        """Residual after attention as the MLP sees it; a family without that norm: scaled to unit mean square."""
        return self._norm_mid(residual) if self._norm_mid else F.rms_norm(residual, residual.shape[-1:])

    def heads(self, normed: Tensor, shared: SharedKV) -> Tensor:
        """Concatenated heads [rows, T, heads * head_dim], the input of the output projection."""
        with self.precision():
            return self.attention(normed.to(self._factory.dtype), shared_kv_states=shared, **self._call)[0]

    def attend(self, hidden: Tensor, heads: Tensor) -> Tensor:
        """Residual after attention."""
        with self.precision():
            return hidden + _added(self.output(heads), self._norm_attention, self._multiplier)

    def mlp(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Residual after the MLP, the next layer's input, from this layer's (`hidden`) and the one after attention."""
        with self.precision():
            branch = self._mlp(self._mlp_input(hidden, residual).to(self._factory.dtype))
            branch = branch[0] if isinstance(branch, tuple) else branch  # GPT-OSS: and what its router says
            return residual + _added(branch, self._norm_mlp, self._multiplier)

    def past(self, hidden: Tensor, shared: SharedKV) -> Tensor:
        """The residual stream behind the layer."""
        return self.mlp(hidden, self.attend(hidden, self.heads(self.norm_in(hidden), shared)))

    def _mlp_input(self, hidden: Tensor, residual: Tensor) -> Tensor:
        if self.family.parallel:
            return self.norm_in(hidden)
        return self._norm_mid(residual) if self._norm_mid else residual

    def wanted_output(self, hidden: Tensor, target: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
        """What the output projection's matrix should give for `attend(hidden, heads)` to be `target`, and weights.

        Behind a norm only the direction counts: the wanted vector gets the length that the present one has. Weights
        [rows, T] make an error count relative to the residual.
        """
        change, weight = (target - hidden) / self._multiplier, 1 / target.square().mean(-1).clamp_min(1e-12)
        if self._norm_attention:
            with self.precision():
                size = self.output(heads).float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
            gain, _ = gain_of(self._norm_attention)
            change = change / gain.where(gain.abs() > 1e-3, torch.inf) * size
            weight = weight / size[..., 0].square()
        return change - (0 if self.output.bias is None else self.output.bias), weight

    def output_gains(self) -> Tensor:
        """Squared gain of each channel of the output projection on its way to the residual, mean 1: [hidden] or [].

        Behind a norm small gains matter: refitting such a channel does little for the residual, and what the channel
        grows by the norm takes from all others.
        """
        if not self._norm_attention:
            return torch.ones((), device=self.device)
        square = gain_of(self._norm_attention)[0].square()
        return (square / square.mean()).clamp_min(1e-6)

    def trainable(self) -> dict[str, nn.Parameter]:
        """What reconstruction may change (projections and norms of queries and keys), by name inside the layer."""
        prefix = self.family.attention
        found = {f"{prefix}.{name}": p for name, p in self.attention.named_parameters()}
        return found | {f"{prefix}.{self.family.o_proj}.{name}": p for name, p in self.output.named_parameters()}

    def gains(self) -> dict[str, Tensor]:
        """Of the norms of queries and keys, float32, by the names that `trainable` gives their weights."""
        norms = {name: self.norm(name) for name in ("q", "k")}
        return {
            f"{self.family.attention}.{self.family.norm_name(name)}.weight": gain_of(norm)[0]
            for name, norm in norms.items()
            if norm is not None
        }

    def norm(self, name: str) -> nn.Module | None:
        """The norm of the queries (`q`) or keys (`k`), if there is one: consumers have none of keys."""
        return getattr(self.attention, self.family.norm_name(name), None) if self.family.qk_norm else None


def gain_of(norm: nn.Module) -> tuple[Tensor, float]:
    """What a norm multiplies by, per channel, and how much of it is not in its weight (Gemma's weight is gain - 1)."""
    weight: Any = norm.weight
    gain = norm(torch.full_like(weight, 1e3, dtype=torch.float32)).float()
    return gain, round((gain - weight).mean().item())


def matmul_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    return torch.bfloat16 if has_native_bfloat16(device) else torch.float32


def _added(branch: Tensor, norm: nn.Module | None, multiplier: float) -> Tensor:
    """What a branch adds to the residual stream."""
    branch = norm(branch.float()) if norm else branch
    return branch if multiplier == 1 else branch.float() * multiplier


def _for_layers(call: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """A recorded call without cache and shared K/V, floating tensors (rotary tables, masks) in the compute dtype."""
    dropped = ("shared_kv_states", "past_key_values", "cache", "layer_past", "use_cache")

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return {
        name: tuple(map(cast, value)) if isinstance(value, tuple) else cast(value)
        for name, value in call.items()
        if name not in dropped
    }
