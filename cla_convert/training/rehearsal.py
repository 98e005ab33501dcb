"""What a training pass needs beside weights: counted on a model without numbers, on torch's meta device.

The model's own forward pass runs there in a second, whatever its size, and autograd names what it saves. Only attention
has a stand-in, because the meta device cannot choose a kernel: it keeps what flash attention (arXiv 2205.14135) keeps,
queries, keys, values, output and a number a row; where a family has no such kernel, its eager function runs.

A compiled layer keeps less. torch's partitioner (functorch's min-cut rematerialisation) recomputes what is elementwise
and keeps what matrix products and attention read or wrote and the residual stream, once, in its own dtype: `_kept`.
"""

import sys
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..models.classes import register_type
from ..models.scoring import hidden_states
from .loss import Target, Terms, vocabulary_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}
_NOT_OF_THE_SHAPE = {"model_type", "auto_map", "quantization_config", "attn_implementation", "_attn_implementation"}
_STAND_IN = "cla_rehearsal"


def skeleton(config: Mapping[str, Any]) -> Any:
    """The causal language model that a config.json describes, in training mode, on the meta device."""
    register_type(config["model_type"])
    settings = {key: value for key, value in config.items() if key not in _NOT_OF_THE_SHAPE}
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    return model.train()


def kept_bytes(model: "PreTrainedModel", length: int, *, compiled: bool, documents: bool = False) -> float:
    """Bytes that the layers of `model` keep for a sequence of `length` tokens.

    Args:
        model: on the meta device, its weights in the compute dtype, with what is not trained frozen.
        length: tokens.
        compiled: whether the layers run under torch.compile.
        documents: whether a dense mask keeps documents apart.
    """
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    record = _Record()
    with _attention_stand_in(model, record, documents), record, torch.autograd.graph.saved_tensors_hooks(
        record.save, lambda tensor: tensor
    ):  # fmt: skip
        hidden_states(model, ids)
    weights = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    saved = {key: tensor for key, tensor in record.saved.items() if key not in weights}
    return sum(record.kept(key, tensor) if compiled else _size(tensor) for key, tensor in saved.items())


def loss_bytes(head: torch.Tensor, positions: int, terms: Terms, chunk: int, *, teacher: bool, compiled: bool) -> float:
    """Peak of `vocabulary_loss`, beside its arguments, for so many positions.

    Args:
        head: the output embedding [V, D] on the meta device, in the compute dtype; whether it is trained counts.
        positions: of the micro-batch.
        terms: of the objective.
        chunk: positions whose logits exist at a time.
        teacher: whether there is one.
        compiled: then a chunk has both models' logits and the gradient, in the compute dtype, and nothing else.
    """
    few = min(positions, 2 * chunk)  # the third chunk is as the second
    others = (positions - few) * head.shape[1] * head.element_size()  # of the gradient of the hidden states
    hidden = head.new_empty(1, few, head.shape[1]).requires_grad_()
    if compiled:
        chunks = (2 + teacher) * min(chunk, positions) * head.shape[0] * head.element_size()
        return others + chunks + _size(hidden) + head.requires_grad * head.numel() * (4 + head.element_size())
    labels = torch.zeros(1, few, dtype=torch.long, device="meta")
    target = Target(hidden.detach(), head.detach()) if teacher else None
    with _Live() as live:
        vocabulary_loss(hidden, head, labels, terms, teacher=target, chunk=chunk)
    return others + live.peak


class _Live(TorchDispatchMode):
    """Bytes of what operations have made and nobody has dropped: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage, key = tensor.untyped_storage(), _storage(tensor)
            if key not in self.known and key not in given:
                self.known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._drop, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@dataclass
class _Record(TorchDispatchMode):
    """Who made and who read each storage, and which of them autograd saved. Keeps all alive: addresses stay unique."""

    made: dict[int, str] = field(default_factory=dict)
    read: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    saved: dict[int, torch.Tensor] = field(default_factory=dict)
    alive: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        for tensor in _tensors((args, kwargs)):
            self.read[_storage(tensor)].add(name)
        for tensor in _tensors(result):
            self.made.setdefault(_storage(tensor), name)
            self.alive.append(tensor)
        return result

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        """Called by autograd for each tensor that it saves."""
        self.saved[_storage(tensor)] = tensor
        return tensor

    def attention(self, *tensors: torch.Tensor) -> None:
        """Note what an attention kernel reads or writes."""
        for tensor in tensors:
            self.read[_storage(tensor)] |= _PRODUCTS

    def kept(self, key: int, tensor: torch.Tensor) -> float:
        """Bytes of it that a compiled layer keeps."""
        made = self.made.get(key)
        if made in _PRODUCTS or self.read[key] & _PRODUCTS or made == "add":
            return _size(tensor)
        # A float32 copy of the residual stream, or probabilities: kept once, in the compute dtype.
        return _size(tensor) / 2 if made in ("_to_copy", "_softmax") and tensor.dtype == torch.float32 else 0


class _Flash(torch.autograd.Function):
    """Shapes of attention, and what its backward pass needs."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, record: _Record) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        result = query.new_empty(batch, length, heads, value.shape[-1])
        sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, sums)
        record.attention(query, key, value, result, sums)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("nothing is trained on the meta device")


@contextmanager
def _attention_stand_in(model: "PreTrainedModel", record: _Record, documents: bool) -> Iterator[None]:
    """Let the model's attention be counted.

    transformers makes no mask for an attention that it does not know: masks need numbers.
    """
    usual = model.config._attn_implementation

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        if usual == "eager":
            return sys.modules[type(module).__module__].eager_attention_forward(
                module, query, key, value, None, **kwargs
            )
        window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
        if documents or (window and window < query.shape[2]):  # behind a dense mask, K/V are copied to every head
            groups = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(groups, 1) if groups > 1 else tensor for tensor in (key, value))
        return _Flash.apply(query, key, value, record), None

    ALL_ATTENTION_FUNCTIONS.register(_STAND_IN, attend)
    model.config._attn_implementation = _STAND_IN
    try:
        yield
    finally:
        model.config._attn_implementation = usual
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(_STAND_IN, None)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()
