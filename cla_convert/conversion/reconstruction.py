"""A few steps of gradient descent that make a group's attention match the teacher's, from the closed form onwards.

The closed form measures key errors by plain query energy; here they count by what they do to the output, through
softmax. Only attention runs: consumers read the teacher's residual stream (as if everything before them were right),
the owner reads the student's, whose errors its K/V must live with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..bars import tick
from ..effort import Effort
from .blocks import Block, SharedKV

LEARNING_RATE = 0.02
BEHIND_NORMS = 0.01
"""Learning rate of families that normalise queries and keys: with large gains a step counts for more."""
MOMENTUM = 0.9
WARMUP = 0.05
_EAGER = 3
"""Steps before a GPU records one: libraries have allocated by then what they need."""
_WORTH_RECORDING = 40
"""Steps in all. Recording empties torch's cache of GPU memory, which a search with its many short groups would feel."""


@dataclass(frozen=True)
class Member:
    """One layer of the group being matched."""

    block: Block
    inputs: Tensor
    """Residual stream [rows, T, hidden] it reads."""
    targets: Tensor
    """The teacher's residual stream after this layer's attention."""


def reconstruct_group(members: Sequence[Member], effort: Effort, *, seed: int, name: str = "") -> float:
    """Train the members' attention in place; returns the mean `mismatch` afterwards, on up to 8 rows.

    `name` is what a progress bar calls the group.

    Loss: the sum of the members' `mismatch`. Optimiser: Muon (Jordan et al. 2024), whose orthogonalised steps reach the
    same loss in several times fewer steps than Adam's here; the step of a matrix is relative to its root mean square,
    with cosine decay. Vectors (biases) move along their normalised gradient by the same rule; gains of norms, which
    differ widely, each in proportion to itself.
    """
    rows, length = members[0].inputs.shape[:2]
    per_step = max(1, effort.tokens_per_step // length)
    peak = BEHIND_NORMS if members[0].block.family.qk_norm else LEARNING_RATE
    descent = _Descent(members, record=effort.steps >= _WORTH_RECORDING)
    for step, chosen in enumerate(_row_order(rows, per_step, effort.steps, seed)):
        descent.step(chosen, peak * _schedule(step, effort.steps))
        tick("matching", note=name)
    del descent  # the memory of a recorded step
    with torch.no_grad():
        probe = torch.arange(min(rows, 8)).split(per_step)
        losses = [_loss(members, [_rows(member, part) for member in members]) * len(part) for part in probe]
        return torch.stack(losses).sum().item() / min(rows, 8) / len(members)


class _Descent:
    """Steps of one group. A GPU replays a recorded one: launching kernels one by one takes longer than their work."""

    def __init__(self, members: Sequence[Member], *, record: bool) -> None:
        self._members = members
        self._parameters = [p for member in members for p in member.block.trainable().values()]
        self._momenta = [torch.zeros_like(p) for p in self._parameters]
        self._sizes = [size for member in members for size in _sizes(member.block)]
        self._batch: list[tuple[Tensor, Tensor]] = []
        self._rate = torch.zeros((), device=members[0].block.device)
        self._record, self._steps = record and self._rate.is_cuda, 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def step(self, rows: Tensor, rate: float) -> None:
        """One step on some rows, always the same number of them."""
        batch = [_rows(member, rows) for member in self._members]
        if not self._batch:
            self._batch = batch
        for kept, new in zip(self._batch, batch, strict=True):
            for tensor, values in zip(kept, new, strict=True):
                tensor.copy_(values)
        self._rate.fill_(rate)
        if self._record and self._steps == _EAGER:
            self._graph, device = torch.cuda.CUDAGraph(), self._rate.device
            with torch.cuda.device(device), torch.cuda.graph(self._graph, stream=_stream(device)):
                self._update()
        if self._graph:
            self._graph.replay()
        else:
            self._update()
        self._steps += 1

    def _update(self) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            gradients = list(torch.autograd.grad(_loss(self._members, self._batch), self._parameters))
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        for i, momentum in enumerate(self._momenta):
            gradients[i] *= self._sizes[i]
            momentum.mul_(MOMENTUM).add_(gradients[i])
            gradients[i] = gradients[i] + MOMENTUM * momentum  # frees the old one: of a large layer they are gigabytes
        for parameter, update, size in zip(self._parameters, _directions(gradients), self._sizes, strict=True):
            parameter.data.sub_(self._rate * size * update)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """What steps are recorded on; one for each device, because cuBLAS keeps a workspace for every stream it meets."""
    return torch.cuda.Stream(device)


def _sizes(block: Block) -> list[Tensor]:
    """What a step of each trainable parameter is relative to: its root mean square, or each gain itself."""
    gains = block.gains()
    return [gains[n].abs() if n in gains else p.detach().square().mean().sqrt() for n, p in block.trainable().items()]


def mismatch(block: Block, residual: Tensor, target: Tensor) -> Tensor:
    """Relative squared error of the normed residual: what the MLP behind it will see.

    The norm makes every token count alike; massive activations would otherwise dominate.
    """
    wanted = block.view(target)
    return (block.view(residual) - wanted).square().mean() / wanted.square().mean()


def _rows(member: Member, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets of some rows, on the device of the layer."""
    device = member.block.device
    inputs, targets = (t[rows.to(t.device)].to(device, torch.float32) for t in (member.inputs, member.targets))
    return inputs, targets


def _loss(members: Sequence[Member], batch: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    shared: SharedKV = {}
    losses = []
    for member, (inputs, targets) in zip(members, batch, strict=True):
        heads = member.block.heads(member.block.norm_in(inputs), shared)
        losses.append(mismatch(member.block, member.block.attend(inputs, heads), targets))
    return torch.stack(losses).sum()


def _row_order(rows: int, per_step: int, steps: int, seed: int) -> Sequence[Tensor]:
    """Row indices of each step: shuffled epochs, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * per_step / rows)
    order = [torch.randperm(rows, generator=generator) for _ in range(epochs)]
    return torch.cat(order)[: steps * per_step].split(per_step) if order else []


def _schedule(step: int, steps: int) -> float:
    """Short linear warm-up, then cosine decay towards 0."""
    return min(1.0, (step + 1) / max(1.0, WARMUP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


def _directions(updates: Sequence[Tensor]) -> list[Tensor]:
    """Updates scaled to a root mean square of about 1, matrices with all their singular values made alike."""
    result = [u if u.dim() == 2 else u / u.square().mean().sqrt().clamp_min(1e-12) for u in updates]
    for shape in {update.shape for update in updates if update.dim() == 2}:
        indices = [i for i, update in enumerate(updates) if update.shape == shape]
        stack = orthogonalise(torch.stack([updates[i] for i in indices])) * math.sqrt(max(shape))
        for i, direction in zip(indices, stack, strict=True):
            result[i] = direction
    return result


def orthogonalise(matrices: Tensor) -> Tensor:
    """Approximate U V^T of each SVD U S V^T, [n, rows, columns], by five Newton-Schulz steps (Muon's quintic).

    Singular values end near 1. bfloat16 is enough: the iteration corrects itself.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    x = (wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
