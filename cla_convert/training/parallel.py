"""One training run on several processes: parameters sharded with FSDP2, every step the same as on one process.

A `Team` is the processes of a run; without torchrun it has one member and does nothing. What keeps its steps equal to
those of a single process:

- Which sequences a step takes is a function of the step; the team only divides them (`share`).
- The loss is divided by the targets of the whole step, so gradients must be *summed* over the processes. FSDP2 averages
  by default; `shard` turns that off.
- FSDP2's mixed precision gathers parameters in the compute dtype and reduces gradients in float32, which is what
  `Precision.working_copy` does on one process.

Of several machines, each may hold the whole model among its own processes (HSDP, `train.shard_degree`): rows of the
mesh divide the parameters, columns hold the same, and only gradients travel between machines, once a step.

Parameters are gathered layer by layer in every pass, and gradients reduced, which needs least memory; or, where there
is room for a whole model and its gradients, once a step (ZeRO stages 3 and 1, Rajbhandari et al. 2020).

A teacher is sharded the same way where it does not fit whole. Whole it needs no traffic, and the student's frozen
weights that are the teacher's need none either: they are left out of the sharding.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ..environment import rank, world_size
from ..errors import Interrupted, UsageError
from .layout import shards_of
from .sharded import let_run_gathered, run_gathered, whole
from .torchrun import PATIENCE, parent, store

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
    """For what is agreed between the processes on the CPU."""
    patient: Any = None
    """The same, but it waits for as long as process 0 needs."""
    local_rank: int = 0
    """Of this process on its machine."""
    shards: int = 1
    """Parts that the parameters are divided into; processes that differ by a multiple of it hold the same part."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    @property
    def part(self) -> int:
        """Which part of the parameters this process holds."""
        return self.rank % self.shards

    @property
    def replicated(self) -> bool:
        """Whether other processes hold the same part."""
        return self.shards < self.size

    @property
    def saves(self) -> bool:
        """Whether this process, of those that hold its part, is the one that saves it."""
        return self.rank < self.shards

    def share(self, first: int, end: int, micro_batch: int) -> list[range]:
        """This process's passes over sequences first .. end-1 of a step; an empty range is a pass for nothing.

        FSDP2 gathers parameters from all processes, so all of them have to make the same number of passes.
        """
        return share(first, end, micro_batch, self.rank, self.size)

    def all_shares(self, first: int, end: int, micro_batch: int) -> list[range]:
        """The passes of all processes, in the order of `gather`."""
        return [part for rank in range(self.size) for part in share(first, end, micro_batch, rank, self.size)]

    def shard(
        self,
        model: torch.nn.Module,
        compute: torch.dtype,
        *,
        whole: Collection[torch.nn.Parameter] = (),
        once: bool = False,
    ) -> None:
        """Leave to this process its rows of every parameter; each layer is gathered when it runs.

        Args:
            model: may be on the meta device still.
            compute: dtype of what is gathered.
            whole: parameters that stay as they are, frozen ones; so do those of another dtype, which is no accident.
            once: keep what a forward pass has gathered for its backward pass; see `begin_pass`.
        """
        if self.size == 1:
            return
        mesh = self._mesh()
        policy = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        names = set(getattr(model, "_no_split_modules", None) or ())
        kept = {p for p in model.parameters() if not p.requires_grad and p.dtype != compute}
        for layer in [*(module for module in model.modules() if type(module).__name__ in names), model]:
            fully_shard(
                layer,
                mesh=mesh,
                mp_policy=policy,
                ignored_params={*whole, *kept},
                reshard_after_forward=False if once else None,
            )
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other; for NCCL it is the same sum
        let_run_gathered(model)

    def _mesh(self) -> DeviceMesh:
        """One row of all processes, or as many rows as there are replicas."""
        kind = torch.device(self.device).type
        if not self.replicated:
            return init_device_mesh(kind, (self.size,))
        return init_device_mesh(kind, (self.size // self.shards, self.shards), mesh_dim_names=("replicas", "shards"))

    def begin_pass(self, model: Any, *, last: bool, once: bool) -> None:
        """Say what the next backward pass of a sharded model reduces, and whether the model stays gathered after it.

        Args:
            model: to be run.
            last: whether it is a step's last pass, which adds up the gradients of replicas.
            once: until then, every process keeps its own gradients, and the whole model.
        """
        if once:
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last)
        elif self.replicated:
            model.set_requires_all_reduce(last)

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
            dist.barrier(group=self.patient)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Process 0 does this alone, then one of each other machine, then the rest.

        What is cached is made once where the machines share the cache, and once a machine where they do not.
        """
        turn = 0 if self.leads else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.barrier()
        yield
        for _ in range(2 - turn):
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
def team(device: str, shard_degree: int | Literal["all", "node"] = "all") -> Iterator[Team]:
    """The processes that torchrun started, connected; one member without torchrun.

    Args:
        device: `cpu` or `cuda` (each process then takes the GPU of its number); with one process any device.
        shard_degree: how many divide the parameters, as the recipe has it.

    Raises:
        UsageError: several processes cannot share the device, or not be divided so.
    """
    if world_size() == 1:
        yield Team(device)
        return
    parent()
    here, number = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"))
    check_team(device, here)
    shards = shards_of(shard_degree, world_size(), here)
    device = device if device == "cpu" else f"cuda:{number}"
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
        groups = [dist.new_group(backend="gloo", timeout=timeout) for timeout in (_COLLECTIVE_TIMEOUT, PATIENCE)]
        crew = Team(device, rank(), world_size(), *groups, local_rank=number, shards=shards)
        _check_alike(crew, here)
        yield crew
    except Interrupted:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not after other errors: the rest may never answer


def _check_alike(crew: Team, processes: int) -> None:
    """Raise UsageError if machines have different numbers of processes, and that matters."""
    numbers = crew.collect((processes, crew.shards))
    if len({shards for _, shards in numbers}) > 1:
        raise UsageError(
            "train.shard_degree=node needs as many processes on every machine",
            f"They have {', '.join(map(str, sorted({found for found, _ in numbers})))}.",
            "Give train.shard_degree a number, or `all`.",
        )


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
