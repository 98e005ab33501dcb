"""One decoder layer at a time, out of transformers' own classes, with its attention split where calibration needs it.

An attention layer is used as `heads` (normed input -> concatenated heads) followed by `o_proj`. A consumer reads its
owner's post-RoPE K/V through the cache argument that every transformers attention has.
"""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..environment import has_native_bfloat16
from ..errors import InputError
from ..models.families import family_of

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Source(Protocol):
    """A lazily read checkpoint."""

    @property
    def config(self) -> dict[str, Any]:
        """Contents of config.json."""
        ...

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Everything the checkpoint holds, by name."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        ...


class KVSlot:
    """Stands in for a cache: keeps what the owner computes, hands it to consumers. Tensors [rows, KV heads, T, D]."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by the attention with its own K/V; returns those it shall attend to."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        return self.keys, self.values


class _Absent(nn.Module):
    """A consumer's k_proj and v_proj: costs nothing; the result is never read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.width)


class Factory:
    """Builds the layers of one model on one device."""

    def __init__(self, source: Source, config: dict[str, Any], length: int, device: str, dtype: torch.dtype) -> None:
        """Read the config. Raises InputError for a family that is unsupported or normalises q or k.

        Args:
            source: where weights are read from.
            config: config.json of the source model.
            length: tokens per calibration row.
            device: where layers live and run.
            dtype: of matrix products; weights and residual streams stay float32.
        """
        from transformers import AutoConfig

        family = family_of(config)
        module = import_module(f"transformers.models.{family.model_type}.modeling_{family.model_type}")
        self._layer_class = getattr(module, f"{family.class_prefix}DecoderLayer")
        self._norm_class = getattr(module, f"{family.class_prefix}RMSNorm")
        self.source, self.device, self.dtype = source, torch.device(device), dtype
        self.batch = 8192 if self.device.type == "cuda" else 2048  # tokens at a time: fills a GPU, fits a CPU's caches
        self.config = AutoConfig.for_model(**config)
        self.config._attn_implementation = "sdpa"
        rotary = getattr(module, f"{family.class_prefix}RotaryEmbedding")(self.config).to(self.device)
        self.rotary_dim = 2 * rotary.inv_freq.numel()
        positions = torch.arange(length, device=self.device)[None]
        self.rope: tuple[Tensor, Tensor] = rotary(torch.empty(0, device=self.device, dtype=dtype), positions)
        if any(name.endswith(("q_norm.weight", "k_norm.weight")) for name in source.tensors):
            raise InputError(
                f"--init calibrated does not yet support models that normalise queries or keys ({family.model_type})",
                why="A change of basis does not fold exactly into W_Q behind a norm.",
                fix="Use --init mean.",
            )

    def read_layer(self, index: int, *, mlp: bool = True) -> dict[str, Tensor]:
        """Weights of a layer in float32, by their name inside the layer."""
        prefix = f"model.layers.{index}."
        names = [n for n in self.source.tensors if n.startswith(prefix) and (mlp or ".mlp." not in n)]
        weights = ((name.removeprefix(prefix), self.source.read(name)) for name in names)
        return {name: weight.to(self.device, torch.float32, copy=True) for name, weight in weights}  # trained in place

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [rows, T, hidden] of token ids, on the CPU."""
        return self.source.read("model.embed_tokens.weight")[tokens].float()

    def head(self) -> Callable[[Tensor], Tensor]:
        """The end of the model: residual [T, hidden] -> log-probabilities [T, vocabulary], float32."""
        tied = "lm_head.weight" not in self.source.tensors
        weight = self.source.read("model.embed_tokens.weight" if tied else "lm_head.weight").to(self.device, self.dtype)
        last = self._norm_class(self.config.hidden_size, self.config.rms_norm_eps).to(self.device)
        last.weight.data = self.source.read("model.norm.weight").to(self.device, torch.float32)
        return lambda residual: (last(residual).to(self.dtype) @ weight.T).float().log_softmax(-1)

    def build(
        self, index: int, weights: Mapping[str, Tensor], *, consumer: bool = False, training: bool = False
    ) -> "Block":
        """A runnable layer from `read_layer`'s weights (without the mlp: only its attention runs).

        Norms stay float32 and so do, if they are to be trained, the matrices.
        """
        with torch.device("meta"):
            layer = self._layer_class(self.config, index)
        cast = {n: w if training or "norm" in n else w.to(self.dtype) for n, w in weights.items()}
        layer.load_state_dict(cast, strict=False, assign=True)
        return Block(layer.eval().requires_grad_(False), self, consumer=consumer)


class Block:
    """A decoder layer on float32 residual streams [rows, T, hidden]."""

    def __init__(self, layer: Any, factory: Factory, *, consumer: bool) -> None:
        self.layer, self._factory = layer, factory
        self.o_proj: nn.Linear = layer.self_attn.o_proj
        layer.self_attn.o_proj = nn.Identity()
        if consumer:
            width = layer.self_attn.k_proj.out_features
            layer.self_attn.k_proj, layer.self_attn.v_proj = _Absent(width), _Absent(width)

    def precision(self) -> torch.autocast:
        """Context of all matrix products: casts the float32 weights of a layer in training."""
        dtype = self._factory.dtype
        return torch.autocast(self._factory.device.type, dtype, enabled=dtype != torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the layer runs."""
        return self._factory.device

    def norm_in(self, hidden: Tensor) -> Tensor:
        """Normed attention input x."""
        return self.layer.input_layernorm(hidden)

    def norm_mid(self, residual: Tensor) -> Tensor:
        """Normed MLP input."""
        return self.layer.post_attention_layernorm(residual)

    def heads(self, normed: Tensor, slot: KVSlot) -> Tensor:
        """Concatenated heads [rows, T, heads * head_dim], the input of o_proj."""
        with self.precision():
            return self.layer.self_attn(
                hidden_states=normed.to(self._factory.dtype),
                position_embeddings=self._factory.rope,
                attention_mask=None,  # sdpa is then causal
                past_key_values=slot,
            )[0]

    def attend(self, hidden: Tensor, heads: Tensor) -> Tensor:
        """Residual after attention."""
        with self.precision():
            return hidden + self.o_proj(heads)

    def mlp(self, residual: Tensor) -> Tensor:
        """Residual after the MLP: the next layer's input."""
        with self.precision():
            return residual + self.layer.mlp(self.norm_mid(residual).to(self._factory.dtype))

    def trainable(self) -> dict[str, nn.Parameter]:
        """Attention projections that this layer has (a consumer: q and o), by their name inside the layer."""
        modules: Iterable[tuple[str, Any]] = [
            *((name, getattr(self.layer.self_attn, name)) for name in ATTENTION[:3]),
            ("o_proj", self.o_proj),
        ]
        return {
            f"self_attn.{name}.{kind}": parameter
            for name, module in modules
            if isinstance(module, nn.Linear)
            for kind, parameter in module.named_parameters()
        }


def matmul_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    return torch.bfloat16 if has_native_bfloat16(device) else torch.float32
