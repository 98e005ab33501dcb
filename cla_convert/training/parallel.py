"""One training run on several processes: parameters sharded with FSDP2, every step the same as on one process.

A `Team` is the processes of a run; without torchrun it has one member and does nothing. What keeps its steps equal to
those of a single process:

- Which sequences a step takes is a function of the step; the team only divides them (`share`).
- The loss is divided by the targets of the whole step, so gradients must be *summed* over the processes. FSDP2 averages
  by default; `shard` turns that off.
- FSDP2's mixed precision gathers parameters in the compute dtype and reduces gradients in float32, which is what
  `Precision.working_copy` does on one process.

A teacher is sharded the same way where it does not fit whole. Whole it needs no traffic, and the student's frozen
weights that are the teacher's need none either: they are left out of the sharding.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
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

    def shard(
        self, model: torch.nn.Module, compute: torch.dtype, *, whole: Collection[torch.nn.Parameter] = ()
    ) -> None:
        """Leave to this process its rows of every parameter; each layer is gathered when it runs.

        Args:
            model: may be on the meta device still.
            compute: dtype of what is gathered.
            whole: parameters that stay as they are, frozen ones.
        """
        if self.size == 1:
            return
        mesh = init_device_mesh(torch.device(self.device).type, (self.size,))
        policy = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        names = set(getattr(model, "_no_split_modules", None) or ())
        for layer in [*(module for module in model.modules() if type(module).__name__ in names), model]:
            fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=set(whole))
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
        return run_gathered(function, model, *args, **options)

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

    @contextmanager
    def whole_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[Mapping[str, torch.Tensor]]:
        """`tensors` as one process would have them, put together one at a time as process 0 asks for them.

        The others help until it leaves the context, and have none. All processes must enter.
        """
        if self.leads:
            try:
                yield _Whole(tensors, self)
            finally:
                self.decide(None)
            return
        while (name := self.decide(None)) is not None:
            whole(tensors[name])
        yield {}


@dataclass(frozen=True)
class _Whole(Mapping[str, torch.Tensor]):
    """For process 0: see `Team.whole_tensors`."""

    tensors: Mapping[str, torch.Tensor]
    team: Team

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        self.team.decide(name)
        return whole(tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


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


def run_gathered(function: Callable[..., T], model: Any, *args: Any, **options: Any) -> T:
    """`function(model, ...)`, with what lies outside the layers of a sharded model gathered until `release`."""
    run = getattr(model, "run_as_forward", None)
    return function(model, *args, **options) if run is None else run(function, *args, **options)


def release(model: torch.nn.Module) -> None:
    """Give back what `run_gathered` has gathered of a model that has no backward pass, which would do it."""
    if isinstance(model, FSDPModule):
        model.reshard()


def _run(model: Any, function: Callable[..., T], *args: Any, **options: Any) -> T:
    return function(model, *args, **options)
