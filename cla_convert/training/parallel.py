"""One training run on several processes: parameters sharded with FSDP2, every step the same as on one process.

A `Team` is the processes of a run; without torchrun it has one member and does nothing. What keeps its steps equal to
those of a single process:

- Which sequences a step takes is a function of the step; the team only divides them (`share`).
- The loss is divided by the targets of the whole step, so gradients must be *summed* over the processes. FSDP2 averages
  by default; `shard` turns that off.
- FSDP2's mixed precision gathers parameters in the compute dtype and reduces gradients in float32, which is what
  `Precision.working_copy` does on one process.

The teacher is not sharded: it has two bytes a parameter and no gradients, where the student has sixteen with its
optimiser, and a whole copy needs no traffic at all.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ..environment import rank, world_size
from ..errors import Interrupted, UsageError
from .torchrun import PATIENCE, store

T = TypeVar("T")

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""A process that does not answer for so long within a step is lost."""


@dataclass(frozen=True)
class Team:
    """The processes of a training run, as one of them sees it."""

    device: str = "cpu"
    """Where this process computes."""
    rank: int = 0
    size: int = 1
    group: Any = None
    """For what is agreed between the processes on the CPU; it waits for as long as process 0 needs."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def share(self, first: int, end: int, micro_batch: int) -> list[range]:
        """This process's passes over sequences first .. end-1 of a step; an empty range is a pass for nothing.

        FSDP2 gathers parameters from all processes, so all of them have to make the same number of passes.
        """
        return share(first, end, micro_batch, self.rank, self.size)

    def all_shares(self, first: int, end: int, micro_batch: int) -> list[range]:
        """The passes of all processes, in the order of `gather`."""
        return [part for rank in range(self.size) for part in share(first, end, micro_batch, rank, self.size)]

    def shard(self, model: torch.nn.Module, compute: torch.dtype) -> None:
        """Leave to this process its rows of every parameter, on its device; each layer is gathered when it runs."""
        if self.size == 1:
            return
        mesh = init_device_mesh(torch.device(self.device).type, (self.size,))
        policy = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        names = set(getattr(model, "_no_split_modules", None) or ())
        for layer in [module for module in model.modules() if type(module).__name__ in names]:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other; for NCCL it is the same sum
        model.run_as_forward = MethodType(_run, model)  # type: ignore[assignment]
        register_fsdp_forward_method(model, "run_as_forward")

    def run(self, function: Callable[..., T], model: Any, *args: Any, **options: Any) -> T:
        """`function(model, ...)` with what lies outside the layers gathered, as within the model's own forward.

        Needed because losses use the decoder and the matrix of the head, not the forward method of the whole.
        """
        return function(model, *args, **options) if self.size == 1 else model.run_as_forward(function, *args, **options)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The values [n, ...] of all processes in order, [size * n, ...], the same everywhere."""
        if self.size == 1:
            return values
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values)
        return torch.cat(gathered)

    def any(self, flag: bool) -> bool:
        """Whether it is true on one process at least: the same answer everywhere."""
        return any(self.collect(flag))

    def collect(self, value: T) -> list[T]:
        """Any object of every process, the same list everywhere."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def decide(self, value: T) -> T:
        """Process 0's value, everywhere."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Process 0 does this alone, the others after it: what it caches is made once."""
        if not self.leads:
            self.barrier()
        yield
        if self.leads:
            self.barrier()

    def whole_state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The model's state dict with whole tensors, on process 0; empty elsewhere. All processes must ask."""
        if self.size == 1:
            return model.state_dict()
        state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return state


@contextmanager
def team(device: str) -> Iterator[Team]:
    """The processes that torchrun started, connected; one member without torchrun.

    Args:
        device: `cpu` or `cuda` (each process then takes the GPU of its number); with one process any device.

    Raises:
        UsageError: several processes cannot share the device.
    """
    if world_size() == 1:
        yield Team(device)
        return
    check_team(device, int(os.environ["LOCAL_WORLD_SIZE"]))
    device = device if device == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}"
    if device != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore("team", store()),
        rank=rank(),
        world_size=world_size(),
        timeout=_COLLECTIVE_TIMEOUT,
    )
    try:
        yield Team(device, rank(), world_size(), dist.new_group(backend="gloo", timeout=PATIENCE))
    except Interrupted:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not after other errors: the rest may never answer


def check_team(device: str, processes: int) -> None:
    """Raise UsageError if so many processes of this machine cannot train together on the device."""
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise UsageError(f"Several processes need torch 2.9 or later, this is {torch.__version__}")
    if device not in ("cpu", "cuda"):
        raise UsageError(
            f"{processes} processes cannot share the device {device!r}",
            fix="Use --set device=cuda (one GPU for each process), or start one process.",
        )
    gpus = torch.cuda.device_count()
    if device == "cuda" and processes > gpus:
        raise UsageError(f"{processes} processes, but {gpus} GPUs", fix=f"Start {gpus}.")


def share(first: int, end: int, micro_batch: int, rank: int, size: int) -> list[range]:
    """Divide sequences first .. end-1 evenly among `size` processes; those of process `rank`, in passes.

    One process takes micro-batch after micro-batch. Several take contiguous shares that differ by one at most, and
    where a share needs a pass less than another one it ends with an empty range.
    """
    count = end - first
    start, stop = first + count * rank // size, first + count * (rank + 1) // size
    largest = -(-count // size)
    cuts = [min(stop, start + i * micro_batch) for i in range(-(-largest // micro_batch) + 1)]
    return [range(a, b) for a, b in pairwise(cuts)]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as one process would have it. All processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that lies in this process: FSDP2 shards rows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _run(model: Any, function: Callable[..., T], *args: Any, **options: Any) -> T:
    return function(model, *args, **options)
