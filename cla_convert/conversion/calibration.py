"""Calibrated pooling: the walk over the layers, one at a time, with a teacher and a student stream of activations.

Per group: closed form and block reconstruction (`group_pooling`). Per layer behind the first shared one: refit of W_O,
which pulls the student's residual stream back to the teacher's before the walk moves on. Calibration text is the only
data looked at. Peak memory: the weights of one layer (attention only: of one group) and the streams (`streams.Store`).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bars import tick
from ..effort import Effort
from ..errors import InputError
from ..models.shape import shape_of
from .blocks import Block, Factory, SharedKV
from .factories import Factories, devices_for
from .group_pooling import Pooler
from .initialisation import LayerPatch
from .refit import ridge_towards
from .sharing import activation_bytes, groups_of
from .skeleton import Source
from .source_streams import SourceStreams
from .streams import Part, SecondMoment, Store, Stream, batches, stream_dtype

REFIT_STRENGTH = 0.1
"""Ridge of the W_O refit, relative to the mean diagonal. 0.03 to 0.3 measured alike."""


def calibrated_pooling(
    source: Source,
    config: dict[str, Any],
    kv_source_layers: list[int | None],
    tokens: Tensor,
    *,
    device: str | Sequence[str] = "cpu",
    seed: int = 0,
    effort: Effort | None = None,
    dtype: torch.dtype | None = None,
    spill: Path | None = None,
    kv_heads: int | None = None,
) -> Iterator[LayerPatch]:
    """Yield one patch per layer, in order: the shared K/V of owners and the re-based Q and O of everybody.

    Args:
        source: lazily read checkpoint.
        config: its config.json.
        kv_source_layers: a validated sharing map.
        tokens: int64 [rows, T] of calibration text, rows in random order.
        device: where layers run, `cpu` or `cuda`; or several, which share the rows (`factories.devices_for`).
        seed: of the order of rows; the same seed, device and library versions give the same result.
        effort: steps of block reconstruction; with 0 the closed form stays. Default: `Effort.for_text`.
        dtype: of matrix products; default bfloat16 where the hardware has it. Linear algebra is float64 in any case.
        spill: folder for activations that memory has no room for.
        kv_heads: what every layer will have, a divisor of the source's number; default: as many.

    Raises:
        InputError: the family is not supported, q, k and v do not agree on having biases, there are no tokens, or the
            disk of `spill` is full.
    """
    if tokens.dim() != 2 or not tokens.numel():
        raise InputError("Calibration needs tokens", why=f"Got a tensor of shape {tuple(tokens.shape)}.")
    devices = devices_for(device, shape_of(config).hidden_size, len(tokens))
    effort = effort or Effort.for_text(tokens.numel(), devices[0])
    factories = Factories(Factory(source, config, tokens, devices[0], dtype, kv_heads), devices)
    walk = Walk(factories, kv_source_layers, tokens, effort, seed, spill)
    for layer in range(len(kv_source_layers)):
        with torch.no_grad(), _deterministic():
            patch = walk.visit(layer)
        yield patch
        del patch  # before the next layer needs the room


class Walk:
    """State of the walk: the student's stream, the K/V of owners still read, and the weights already decided."""

    def __init__(
        self,
        factories: Factories,
        kv_source_layers: Sequence[int | None],
        tokens: Tensor,
        effort: Effort,
        seed: int,
        spill: Path | None,
    ) -> None:
        self._factories, self._factory, self._map = factories, factories.first, list(kv_source_layers)
        self._groups = {group[0]: group for group in groups_of(self._map)}
        itemsize = stream_dtype(self._factory.device).itemsize
        needed = activation_bytes(self._map, tokens.numel(), self._factory.config.hidden_size, itemsize)
        store = Store.choose(factories.devices, needed, spill)
        self._store, self._teacher = store, SourceStreams(factories, tokens, store)
        self._pooler = Pooler(factories, self._teacher, effort, seed)
        self._student: Stream | None = None  # None while it is still the teacher's
        self._kv: dict[int, tuple[Stream, Stream]] = {}
        self._decided: dict[int, dict[str, Tensor]] = {}

    def visit(self, layer: int) -> LayerPatch:
        """Decide one layer and move both streams past it."""
        self._teacher.upto(layer)
        owner = self._map[layer]
        if owner is None:
            return self._leave(layer)
        group = self._groups[owner]
        fit = None
        if owner == layer and (len(group) > 1 or self._factory.pools_heads):
            if self._student is None:
                self._student = self._store.empty(*self._teacher.inputs[owner].shape)
                self._student.copy_(self._teacher.inputs[owner])
            decided, fit = self._pooler.pool(group, self._student)
            self._decided |= decided
        elif owner == layer and self._student is not None:
            blocks = self._factories.build(layer, self._factories.read_layer(layer, mlp=False), training=True)
            self._decided |= self._pooler.reconstruct([blocks], group, self._student)[0]
        patch = LayerPatch(layer, {}) if self._student is None else LayerPatch(layer, self._pass(layer, group), fit)
        self._teacher.release(layer)
        if layer == group[-1]:
            self._kv.pop(owner, None)
        return patch

    def _leave(self, layer: int) -> LayerPatch:
        """Move both streams past a layer without attention, which stays as it is."""
        if self._student is not None:
            past = self._factories.passages(layer)
            for part in batches(self._student, self._factories.batch):
                self._student[part] = past[part.device](self._factories.load(self._student, part))
        self._teacher.release(layer)
        return LayerPatch(layer, {})

    def _pass(self, layer: int, group: Sequence[int]) -> dict[str, Tensor]:
        """Move the student's stream past a layer, refitting its W_O on the way; returns the patch's tensors."""
        assert self._student is not None
        tick("matching", 0, f"layer {layer}: output")
        decided = self._decided.pop(layer)
        blocks = self._factories.build(layer, self._factories.read_layer(layer) | decided, group)
        output = self._factory.family.output_weight
        heads, decided[output] = self._refit(layer, blocks, decided[output])
        for part in batches(self._student, self._factories.batch):
            block, hidden = blocks[part.device], self._factories.load(self._student, part)
            self._student[part] = block.mlp(hidden, block.attend(hidden, heads[part].to(block.device)))
        return {f"{self._factory.family.layers}.{layer}.{name}": tensor.cpu() for name, tensor in decided.items()}

    def _refit(self, layer: int, blocks: Sequence[Block], output: Tensor) -> tuple[Stream, Tensor]:
        """Regress what would bring the student onto the teacher's post-attention residual on the student's heads.

        Returns the heads, whose stream is needed again, and the new W_O, which the blocks have, too.
        """
        assert self._student is not None
        gram, cross, width = SecondMoment(), SecondMoment(), blocks[0].output.in_features
        heads = self._store.empty(*self._student.shape[:2], width, dtype=self._factory.dtype)
        for part in batches(self._student, self._factories.batch):
            streams = (self._student, self._teacher.residuals[layer])
            block, (hidden, target) = blocks[part.device], (self._factories.load(one, part) for one in streams)
            shared = self._shared(layer, part, block.device)
            head = block.heads(block.norm_in(hidden), shared)
            self._keep(layer, part, shared)
            heads[part] = head
            wanted, weight = block.wanted_output(hidden, target, head)
            gram.add(head, head, weight)
            cross.add(head, wanted, weight)
        strength = REFIT_STRENGTH / blocks[0].output_gains().double()
        output = ridge_towards(output.double(), gram.value, cross.value, strength).float()
        for block in blocks:
            block.output.weight.data = output.to(self._factory.dtype).to(block.device)
        return heads, output

    def _shared(self, layer: int, part: Part, device: torch.device) -> SharedKV:
        """What a consumer's attention reads; an owner writes into it."""
        owner = self._map[layer]
        if owner is None or owner == layer:
            return {}
        keys, values = (stream[part].to(device) for stream in self._kv[owner])
        return {owner: (keys, values)}

    def _keep(self, layer: int, part: Part, shared: SharedKV) -> None:
        """Keep an owner's K/V if somebody reads them."""
        if self._map[layer] != layer or len(self._groups[layer]) == 1:
            return
        assert self._student is not None
        if layer not in self._kv:
            rows, shape, dtype = self._student.shape[0], shared[layer][0].shape[1:], self._factory.dtype
            self._kv[layer] = self._store.empty(rows, *shape, dtype=dtype), self._store.empty(rows, *shape, dtype=dtype)
        for kept, new in zip(self._kv[layer], shared[layer], strict=True):
            kept[part] = new


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic kernels for a while (attention's backward pass on CUDA is not, by default)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic
    fill = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # attention ignores it when it may only warn
    switches.fill_uninitialized_memory = False  # nothing here reads what it has not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        switches.fill_uninitialized_memory = fill
