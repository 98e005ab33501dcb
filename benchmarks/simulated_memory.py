"""Memory of training large models on many GPUs: the estimate beside a simulation. No GPU, no weights, no network.

    python benchmarks/simulated_memory.py                      # the table of docs/costs.md, some minutes
    python benchmarks/simulated_memory.py --only 8B --gpus 8   # less of it

Simulated is one process of so many: the training's own code (FSDP2, the losses, AdamW) runs two steps on torch's fake
tensors, which have a size and no numbers, in a fake process group, which answers at once. Every storage that an
operation makes is counted until it is dropped or resized. Not compiled, as a compiler would need a GPU; attention is a
stand-in that keeps what flash attention keeps. What it cannot show: blocks that an allocator cannot use, and buffers of
NCCL.
"""

import argparse
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cla_convert.conversion.sharing import sharing_map
from cla_convert.models.export import cla_config
from cla_convert.models.families import FAMILIES
from cla_convert.models.shape import shape_of
from cla_convert.recipe import Train
from cla_convert.training import objective
from cla_convert.training.derived import derived
from cla_convert.training.layout import Layout
from cla_convert.training.memory import CONTEXT, Forecast
from cla_convert.training.optimizer import freeze_all_but, make_optimizer
from cla_convert.training.parallel import Team
from cla_convert.training.precision import cast_frozen
from cla_convert.training.rehearsal import skeleton
from cla_convert.training.weights import twins

GIB, LENGTH = 2**30, 2048
GPUS = (1, 2, 8, 16, 64)
WAYS = "all kept whole, all recomputed sharded"


def llama(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    """A config.json as far as sizes go."""
    return {
        "model_type": "llama", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128, "vocab_size": vocab,
        "max_position_embeddings": 8192, "tie_word_embeddings": False, "dtype": "bfloat16", "pad_token_id": 0,
    }  # fmt: skip


SHAPES = {
    "1B": llama(2048, 8192, 16, 32, 8, 128256) | {"head_dim": 64, "tie_word_embeddings": True},
    "8B": llama(4096, 14336, 32, 32, 8, 128256),
    "32B": llama(5120, 25600, 64, 64, 8, 151936) | {"model_type": "qwen3"},
    "70B": llama(8192, 28672, 80, 64, 8, 128256),
}
"""Llama 3.2 1B, Llama 3.1 8B, Qwen3 32B, Llama 3.1 70B."""


class Counter(TorchDispatchMode):
    """Bytes of all storages that were made and not dropped: now, and at most. FSDP2 frees by resizing to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return result

    def see(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now on."""
        storage = _storage(tensor)
        if storage._cdata not in self.sizes:
            weakref.finalize(storage, self._set, storage._cdata, None)
            self._set(storage._cdata, storage.nbytes())

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Never count these: their numbers are another tensor's, which is counted."""
        for tensor in tensors:
            self.sizes[_storage(tensor)._cdata] = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what happens inside."""
        resize = torch.UntypedStorage.resize_

        def counted(storage: Any, size: int) -> Any:
            done = resize(storage, size)
            if storage._cdata in self.sizes:
                self._set(storage._cdata, storage.nbytes())
            return done

        torch.UntypedStorage.resize_ = counted
        try:
            with self:
                yield
        finally:
            torch.UntypedStorage.resize_ = resize

    def _set(self, key: int, size: int | None) -> None:
        self.now += (size or 0) - self.sizes.pop(key, 0)
        if size is not None:
            self.sizes[key] = size
        self.peak = max(self.peak, self.now)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()


class _Flash(torch.autograd.Function):
    """Shapes of attention, and of its gradients."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        result = query.new_empty(batch, length, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, result, query.new_empty(batch, heads, length, dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class FakeTeam(Team):
    """A mesh is of numbers, which fake tensors have none of."""

    def _mesh(self) -> DeviceMesh:
        with unset_fake_temporarily():
            return super()._mesh()


def simulate(train: Train, student: Mapping[str, Any], teacher: Mapping[str, Any] | None, layout: Layout) -> int:
    """Peak bytes of one of `layout.processes` processes in two steps, the second one of two passes."""
    assert isinstance(train.micro_batch_size, int)
    team = FakeTeam("cpu", 0, layout.processes, shards=layout.shards)
    counter = Counter()
    with _fake_group(layout.processes), FakeTensorMode(allow_non_fake_inputs=True), _as_on_a_gpu():
        model = _model(student, torch.float32)
        guide: Any = None if teacher is None else _model(teacher, torch.bfloat16)
        freeze_all_but(model, train.parameters)
        cast_frozen(model, torch.bfloat16)
        if train.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if guide is not None:
            guide.requires_grad_(False)
        settings = derived(train, model.config, guide and guide.config)
        settings = settings.model_copy(update={"learning_rate": 1e-4})  # weights without numbers have no size
        shared = _divide(team, model, guide, layout)
        loss_of = objective.Objective(settings, model, guide)
        optimizer = make_optimizer(model, settings, "cpu")
        ids = torch.zeros(train.micro_batch_size, train.sequence_length, dtype=torch.long)
        counter.ignore(shared)
        with counter.counting():
            for parameter in [*model.parameters(), *(() if guide is None else guide.parameters())]:
                counter.see(parameter)
            for passes in ([True], [False, True]):
                for last in passes:
                    team.begin_pass(model, last=last, once=layout.gathers_once)
                    loss = team.run(loss_of, model, ids, None, 1.0)[0]
                    loss.backward()
                    del loss
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return counter.peak


def _divide(team: Team, student: Any, teacher: Any, layout: Layout) -> list[torch.Tensor]:
    """Both models, as `teacher.fill_models` does; what of the student is one copy with the teacher's."""
    teacher_too, once = layout.teacher_shards > 1, layout.gathers_once
    if teacher is not None and teacher_too:
        team.shard(teacher, torch.bfloat16)
        team.shard(student, torch.bfloat16, once=once)
    shared = [] if teacher is None else [ours for _, ours, _ in twins(student, teacher)]
    if teacher is None or not teacher_too:
        team.shard(student, torch.bfloat16, whole=shared, once=once)
    return shared


@contextmanager
def _fake_group(size: int) -> Iterator[None]:
    if size == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """The loss in chunks of a GPU's size."""
    before = dict(objective._LOGIT_BYTES)
    objective._LOGIT_BYTES["cpu"] = before["cuda"]
    try:
        yield
    finally:
        objective._LOGIT_BYTES.update(before)


def _model(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A model of fake tensors on the CPU; tied weights stay tied."""
    model, made = skeleton(config), {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = made.setdefault(old, torch.nn.Parameter(torch.empty(old.shape, dtype=dtype)))
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)
    # transformers makes no mask for an attention that it does not know: masks need numbers
    ALL_ATTENTION_FUNCTIONS.register("cla_simulation", lambda _, q, k, v, *__, **___: (_Flash.apply(q, k, v), None))
    model.config._attn_implementation = "cla_simulation"
    return model


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SHAPES), help="comma-separated names of shapes")
    parser.add_argument("--gpus", default=",".join(map(str, GPUS)))
    parser.add_argument("--simulate", default="64", help="numbers of GPUs to simulate, too: minutes for each cell")
    parser.add_argument("--ways", default=WAYS, help="of training to simulate, as in the table; `any` for all")
    options = parser.parse_args()
    numbers, simulated = (
        [int(word) for word in words.split(",") if word] for words in (options.gpus, options.simulate)
    )
    print("| shape | trained | activations | teacher | " + " | ".join(map(str, numbers)) + " |")
    print("|---|---|---|---|" + "--:|" * len(numbers))
    for name in options.only.split(","):
        teacher = SHAPES[name]
        sources = sharing_map("cla2-keep-ends", shape_of(teacher).kinds)
        student = cla_config(teacher, FAMILIES[teacher["model_type"]], sources, "bfloat16")
        ways = {way.strip() for way in options.ways.split(",")}
        for line in _lines(name, student, teacher, numbers, simulated, ways):
            print(line, flush=True)


def _lines(
    name: str,
    student: dict[str, Any],
    teacher: dict[str, Any],
    numbers: list[int],
    simulated: list[int],
    ways: set[str],
) -> Iterator[str]:
    """Lines of the table. On stderr: how far the estimate is above each simulation."""
    for parameters, recomputed in product(("all", "attention"), (False, True)):
        train = _train(max(numbers), parameters=parameters, activation_checkpointing=recomputed)
        forecast = Forecast(train, student, teacher, "cuda")
        for divided in (False, True):
            way = f"{parameters} {'recomputed' if recomputed else 'kept'} {'sharded' if divided else 'whole'}"
            cells = []
            for number in numbers:
                if divided and number == 1:
                    cells.append("-")
                    continue
                layout = Layout(number, number).with_teacher(divided=divided)
                peak = forecast.among(layout).needs(1).peak
                cells.append(f"{(peak + CONTEXT) / GIB:.0f}")
                if number in simulated and {way, "any"} & ways:
                    found = simulate(train, student, teacher, layout)
                    cells[-1] += f" ({(found + CONTEXT) / GIB:.0f})"
                    print(f"{name} {way} {number}: {peak / found - 1:+.1%}", file=sys.stderr, flush=True)
            yield " | ".join([f"| {name}", *way.split(), *cells]) + " |"


def _train(gpus: int, **settings: Any) -> Train:
    batch = 2 * gpus * LENGTH
    return Train(
        tokens=2 * batch, batch_tokens=batch, sequence_length=LENGTH, micro_batch_size=1, precision="bfloat16",
        compile=False, **settings,
    )  # fmt: skip


if __name__ == "__main__":
    main()
