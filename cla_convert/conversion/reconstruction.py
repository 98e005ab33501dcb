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
from .blocks import Block, SharedKV, matmul_dtype
from .streams import Stream

LEARNING_RATE = 0.02
BEHIND_NORMS = 0.01
"""Learning rate of families that normalise queries and keys: with large gains a step counts for more."""
MOMENTUM = 0.9
WARMUP = 0.05
_EAGER = 3
"""Steps before a GPU records one: libraries have allocated by then what they need."""
_WORTH_RECORDING = 40
"""Steps in all. Recording empties torch's cache of GPU memory, which a search with its many short groups would feel."""

Batch = list[tuple[Tensor, Tensor]]
"""Of each member: inputs of some rows, and what should become of them, the normed targets."""


@dataclass(frozen=True)
class Member:
    """One layer of the group being matched."""

    blocks: Sequence[Block]
    """The layer, on each device."""
    inputs: Stream
    """Residual stream [rows, T, hidden] it reads."""
    targets: Stream
    """The teacher's residual stream after this layer's attention."""


def reconstruct_group(members: Sequence[Member], effort: Effort, *, seed: int, name: str = "") -> float:
    """Train the members' attention in place; returns the mean `mismatch` afterwards, on up to 8 rows.

    The blocks of the first device are trained; those of others, which take a share of the rows of every step, are for
    nothing else. `name` is what a progress bar calls the group.

    Loss: the sum of the members' `mismatch`. Optimiser: Muon (Jordan et al. 2024), whose orthogonalised steps reach the
    same loss in several times fewer steps than Adam's here; the step of a matrix is relative to its root mean square,
    with cosine decay. Vectors (biases) move along their normalised gradient by the same rule; gains of norms, which
    differ widely, each in proportion to itself.
    """
    rows, length = members[0].inputs.shape[:2]
    per_step = max(1, effort.tokens_per_step // length)
    peak = BEHIND_NORMS if members[0].blocks[0].family.qk_norm else LEARNING_RATE
    descent = _Descent(members, per_step, record=effort.steps >= _WORTH_RECORDING)
    for step, chosen in enumerate(_row_order(rows, per_step, effort.steps, seed)):
        descent.step(chosen, peak * _schedule(step, effort.steps))
        tick("matching", note=name)
    del descent  # the memory of recorded steps
    with torch.no_grad():
        first, probe = _Replica(members, 0), torch.arange(min(rows, 8)).split(per_step)
        losses = [(first.mismatches(part) * len(part)).mean() for part in probe]
        return torch.stack(losses).sum().item() / min(rows, 8)


class _Descent:
    """Steps of one group, on all devices that have work.

    Each computes the gradients of its rows. Each parameter has one device that moves it, by the sum of them, and gives
    it to the others: the linear algebra of a step is divided, too.
    """

    def __init__(self, members: Sequence[Member], per_step: int, *, record: bool) -> None:
        devices = min(len(members[0].blocks), per_step)
        self._replicas = [_Replica(members, device) for device in range(devices)]
        owned = _shared_out([p.numel() for p in self._replicas[0].parameters], devices)
        self._movers = [_Mover(replica, numbers) for replica, numbers in zip(self._replicas, owned, strict=True)]
        self._record, self._steps = record and self._replicas[0].device.type == "cuda", 0

    def step(self, rows: Tensor, rate: float) -> None:
        """One step on some rows, always the same number of them."""
        shares = rows.sort().values.tensor_split(len(self._replicas))  # in order: most lie where they are needed
        powers = [replica.load(share) for replica, share in zip(self._replicas, shares, strict=True)]
        for replica in self._replicas:
            replica.power.copy_(torch.stack([power.to(replica.device) for power in powers]).sum(0))
        if self._record and self._steps == _EAGER:
            for replica in self._replicas:
                replica.record()
        for replica in self._replicas:
            replica.run()
        for mover in self._movers:
            for other in self._replicas:
                mover.add(other)
        if self._record and self._steps == _EAGER:
            for mover, replica in zip(self._movers, self._replicas, strict=True):
                mover.record(replica)
        for mover in self._movers:
            mover.rate.fill_(rate)
            mover.run()
        for mover in self._movers:
            for other in self._replicas:
                mover.give(other)
        self._steps += 1


class _Recorded:
    """Work that a GPU can replay once it is recorded: launching kernels one by one takes longer than their work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graph: torch.cuda.CUDAGraph | None = None

    def record(self, before: "_Recorded | None" = None) -> None:
        """From now on `run` replays what `work` does now, in the memory of what runs `before` it every time."""
        graph, pool = torch.cuda.CUDAGraph(), before._graph.pool() if before and before._graph else None
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool, stream=_stream(self.device)):
            self.work()
        self._graph = graph

    def run(self) -> None:
        """Do it."""
        if self._graph:
            self._graph.replay()
        else:
            self.work()

    def work(self) -> None:
        """What is recorded. It reads and writes tensors that stay where they are."""
        raise NotImplementedError


class _Replica(_Recorded):
    """The group on one device: gradients of the loss on its rows of a step."""

    def __init__(self, members: Sequence[Member], number: int) -> None:
        self._members, self._blocks = members, [member.blocks[number] for member in members]
        super().__init__(self._blocks[0].device)
        self.parameters = [p for block in self._blocks for p in block.trainable().values()]
        self.sizes = [size for block in self._blocks for size in _sizes(block)]
        self.gradients: list[Tensor] = []
        self.power = torch.ones(len(members), device=self.device)
        """Of the targets of all rows of the step, for each member."""
        self._batch: Batch = []

    def load(self, rows: Tensor) -> Tensor:
        """Take these rows, always the same number; returns the power of their targets for each member."""
        batch = self._read(rows)
        if not self._batch:
            self._batch = batch
        for kept, new in zip(self._batch, batch, strict=True):
            for tensor, values in zip(kept, new, strict=True):
                tensor.copy_(values)
        return _powers(batch)

    def work(self) -> None:
        """Gradients relative to the size of each parameter."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            loss = (_errors(self._blocks, self._batch) / self.power).sum()
            self.gradients = list(torch.autograd.grad(loss, self.parameters))
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        for gradient, size in zip(self.gradients, self.sizes, strict=True):
            gradient.mul_(size)

    def mismatches(self, rows: Tensor) -> Tensor:
        """Each member's relative squared error of the normed residual on some rows: what the MLP behind it will see.

        The norm makes every token count alike; massive activations would otherwise dominate.
        """
        batch = self._read(rows)
        return _errors(self._blocks, batch) / _powers(batch)

    def _read(self, rows: Tensor) -> Batch:
        return [
            (member.inputs.rows(rows, self.device).float(), block.view(member.targets.rows(rows, self.device).float()))
            for member, block in zip(self._members, self._blocks, strict=True)
        ]


class _Mover(_Recorded):
    """The parameters that one device moves, by momentum and orthogonalised steps."""

    def __init__(self, replica: _Replica, owned: Sequence[int]) -> None:
        super().__init__(replica.device)
        self._replica, self._owned = replica, owned
        self._parameters = [replica.parameters[i] for i in owned]
        self._sizes = [replica.sizes[i] for i in owned]
        self._momenta = [torch.zeros_like(p) for p in self._parameters]
        self.rate = torch.zeros((), device=replica.device)

    def add(self, other: _Replica) -> None:
        """Add another device's gradients of these parameters to this one's."""
        if other is not self._replica:
            for i in self._owned:
                self._replica.gradients[i].add_(other.gradients[i].to(self.device))

    def work(self) -> None:
        """One step, by the gradients that are there; they are used up."""
        gradients = [self._replica.gradients[i] for i in self._owned]
        for gradient, momentum in zip(gradients, self._momenta, strict=True):
            momentum.mul_(MOMENTUM).add_(gradient)
            gradient.add_(momentum, alpha=MOMENTUM)  # in place: of a large layer they are gigabytes
        for parameter, update, size in zip(self._parameters, _directions(gradients), self._sizes, strict=True):
            parameter.data.sub_(self.rate * size * update)

    def give(self, other: _Replica) -> None:
        """Give another device the parameters as they are now."""
        if other is not self._replica:
            for i, parameter in zip(self._owned, self._parameters, strict=True):
                other.parameters[i].data.copy_(parameter.data)


def _shared_out(sizes: Sequence[int], among: int) -> list[list[int]]:
    """Numbers of things of these sizes for each of so many, whose sums are about even."""
    shares, loads = [list[int]() for _ in range(among)], [0] * among
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += sizes[i]
    return [sorted(share) for share in shares]


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """What steps are recorded on; one for each device, because cuBLAS keeps a workspace for every stream it meets."""
    return torch.cuda.Stream(device)


def _sizes(block: Block) -> list[Tensor]:
    """What a step of each trainable parameter is relative to: its root mean square, or each gain itself."""
    gains = block.gains()
    return [gains[n].abs() if n in gains else p.detach().square().mean().sqrt() for n, p in block.trainable().items()]


def _powers(batch: Batch) -> Tensor:
    """What errors of each member are relative to; never 0, as of a layer whose norm is."""
    return torch.stack([wanted.square().sum() for _, wanted in batch]).clamp_min(1e-30)


def _errors(blocks: Sequence[Block], batch: Batch) -> Tensor:
    """Each member's squared error of the normed residual, summed over a batch of inputs and what is wanted of them."""
    shared: SharedKV = {}
    errors = []
    for block, (inputs, wanted) in zip(blocks, batch, strict=True):
        heads = block.heads(block.norm_in(inputs), shared)
        errors.append((block.view(block.attend(inputs, heads)) - wanted).square().sum())
    return torch.stack(errors)


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

    Singular values end near 1. bfloat16 is enough, because the iteration corrects itself; where the processor has to
    emulate it, it takes 3 to 18 times as long as float32.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    x = (wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)).to(matmul_dtype(str(matrices.device)))
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
