"""What training needs is foreseen: held to what autograd and torch's allocator do on small models."""

import runpy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cla_convert.console import human_bytes
from cla_convert.errors import InputError
from cla_convert.models.families import FAMILIES
from cla_convert.models.scoring import hidden_states
from cla_convert.recipe import Recipe, Train
from cla_convert.training import compiling
from cla_convert.training.data import TokenStore
from cla_convert.training.layout import Layout
from cla_convert.training.memory import CONTEXT, Forecast
from cla_convert.training.micro_batch import forecast, loading, micro_batch_size
from cla_convert.training.optimizer import freeze_all_but
from cla_convert.training.parallel import Team
from cla_convert.training.rehearsal import _Live, kept_bytes, skeleton
from cla_convert.training.state import Position, TrainingStates
from cla_convert.training.step import take_step
from cla_convert.training.trainer import alike, set_up
from tests.tiny import CASES, cla_model, save_tiny

LENGTH = 64


def in_bfloat16(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def saved_by_autograd(model: Any) -> int:
    """Bytes of all that autograd saves in a forward pass on the CPU, without the weights."""
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        hidden_states(model, torch.zeros(1, LENGTH, dtype=torch.long))
    return sum(storage.nbytes() for key, storage in saved.items() if key not in weights)


def models(case: str, parameters: Any, **overrides: Any) -> tuple[Any, Any]:
    """A CLA model on the CPU and its likeness on the meta device, both as a training pass sees them."""
    real = cla_model(case, None, **overrides).train()
    pair = real, skeleton({**real.config.to_dict(), "model_type": FAMILIES[CASES[case][0]].cla_type})
    for model in pair:
        freeze_all_but(in_bfloat16(model), parameters)
    return pair


@pytest.mark.parametrize("parameters", ["all", "attention"])
@pytest.mark.parametrize("case", ["llama", "llama-biases", "qwen2", "qwen3", "gemma2", "olmo2", "granite", "smollm3"])
def test_activations_are_what_autograd_saves(case: str, parameters: str) -> None:
    real, likeness = models(case, parameters)
    assert kept_bytes(likeness, LENGTH, compiled=False) == saved_by_autograd(real)


@pytest.mark.parametrize("case", CASES)
def test_every_family_can_be_rehearsed(case: str) -> None:
    likeness = models(case, "all")[1]
    short, long = (kept_bytes(likeness, length, compiled=False) for length in (LENGTH, 2 * LENGTH))
    assert 1.9 * short < long and kept_bytes(likeness, LENGTH, compiled=True) <= short


@pytest.mark.parametrize("parameters", ["all", "attention"])
def test_compiled_layers_keep_what_the_partitioner_keeps(parameters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    real, likeness = models("llama", parameters, **wide)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    compiling._compiled_layer.cache_clear()
    compiling.compile_layers(real, 1, LENGTH)
    assert kept_bytes(likeness, LENGTH, compiled=True) == pytest.approx(saved_by_autograd(real), rel=0.05)
    compiling._compiled_layer.cache_clear()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batch_size": 4},
        {"micro_batch_size": 1, "sequence_length": 16, "batch_tokens": 32},  # the end of the backward pass is the peak
        {"parameters": "attention"},
        {"loss": "cross_entropy"},
        {"activation_checkpointing": True},
        {"precision": "float32"},
    ],
    ids=str,
)
def test_the_peak_of_a_step(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A real step on the CPU, every tensor counted: within 5% of the forecast."""
    source = save_tiny("llama", tmp_path / "source", hidden_size=128, intermediate_size=384, head_dim=32)
    train = {"tokens": 4096, "sequence_length": 128, "batch_tokens": 512, "micro_batch_size": 2,
             "precision": "bfloat16", "compile": False, **settings}  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, 256, size=8192).astype(np.uint32)
    store = TokenStore(tokens, tokens[:256], "tokens", {}, np.zeros(0, dtype=np.int64))
    trainer = set_up(source, source, Recipe(train=Train(**train)), "cpu", data=store)
    checkpoints = TrainingStates(tmp_path / "checkpoints", {}, 1)
    position, _ = take_step(trainer, Position(), checkpoints)
    with _Live() as live:
        take_step(trainer, position, checkpoints)
    needs = trainer.forecast.needs(trainer.micro_batch)
    there = needs.weights + needs.moments + needs.teacher
    before = [*trainer.student.parameters(), *(trainer.objective.teacher or torch.nn.Module()).parameters()]
    before += [s for o in trainer.optimizers for state in o.state.values() for s in state.values() if s.numel() > 1]
    held = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in before}
    assert there == pytest.approx(sum(held.values()), rel=0.001)
    assert needs.peak == pytest.approx(there + live.peak, rel=0.05)


LLAMA_8B = {
    "model_type": "cla_llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    "max_position_embeddings": 8192, "kv_source_layers": [0, *(i for i in range(1, 31, 2) for _ in "kv"), 31],
}  # fmt: skip
LLAMA_135M = {
    "model_type": "cla_llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    "max_position_embeddings": 8192, "kv_source_layers": [0, *(i for i in range(1, 29, 2) for _ in "kv"), 29],
}  # fmt: skip


def training(**settings: Any) -> Train:
    some = {"tokens": 10**7, "batch_tokens": 32_768, "sequence_length": 2048, "precision": "bfloat16", "compile": False}
    return Train(**{**some, **settings})


def foresee(shape: dict[str, Any], processes: int = 1, **settings: Any) -> tuple[Forecast, int]:
    return forecast(training(**settings), shape, {**shape, "model_type": "llama"}, "cuda", Layout(processes, processes))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 80 GB."""

    class Card:
        total_memory = 85_000_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)


@pytest.mark.usefixtures("card")
class TestFitting:
    def test_what_was_measured(self) -> None:
        """135M, 32 sequences of 1024 a pass, not compiled: 30.7 GiB on an H200 (docs/measurements.md)."""
        foreseen, rows = foresee(LLAMA_135M, sequence_length=1024, micro_batch_size=32, hidden_weight=0)
        assert foreseen.needs(rows).peak == pytest.approx(30.7 * 2**30, rel=0.05)

    def test_8b_does_not_fit_and_is_told_what_does(self) -> None:
        with pytest.raises(InputError) as error:
            foresee(LLAMA_8B)
        assert "the GPU has 79.2 GiB" in error.value.what and "optimiser 5" in error.value.why
        assert (
            "train.parameters=attention (" in error.value.fix
            and "train.processes=4 on as many GPUs (" in error.value.fix
        )
        assert "activation_checkpointing" not in error.value.fix  # weights and optimiser alone are too much
        foresee(LLAMA_8B, parameters="attention")
        foresee(LLAMA_8B, processes=8)
        with pytest.raises(InputError):
            foresee(LLAMA_8B, processes=2)

    def test_a_teacher_is_divided_where_it_does_not_fit_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def teacher_is_divided(memory: float, **settings: Any) -> bool:
            monkeypatch.setattr("cla_convert.training.micro_batch.device_memory", lambda _: int(memory))
            foreseen, _ = foresee(LLAMA_8B, processes=8, gather="layer", **settings)
            return foreseen.layout.teacher_shards > 1

        whole = foresee(LLAMA_8B, processes=8, gather="layer", shard_teacher=False)[0].needs(1).peak + CONTEXT
        parts = foresee(LLAMA_8B, processes=8, gather="layer", shard_teacher=True)[0].needs(1).peak + CONTEXT
        assert parts < whole - 10e9  # of 16 GB an eighth stays, and two layers, embedding and head are gathered
        assert not teacher_is_divided(whole / 0.9 + 1)
        assert teacher_is_divided(whole / 0.9 + 1, shard_teacher=True)
        assert teacher_is_divided(whole)  # which would leave no tenth free
        assert not teacher_is_divided(whole, shard_teacher=False)
        assert teacher_is_divided(parts)
        with pytest.raises(InputError, match="on each of 8 processes"):
            teacher_is_divided(parts, shard_teacher=False)
        with pytest.raises(InputError, match="on each of 8 processes"):
            teacher_is_divided(parts - 1e6)

    def test_all_divide_the_teacher_where_one_has_no_room_for_it(self) -> None:
        """And take as many sequences a pass as the smallest card holds."""

        class Others(Team):
            def collect(self, value: Any) -> list[Any]:
                return [value, True if isinstance(value, bool) else 2]

        foreseen, rows = foresee(LLAMA_135M, processes=2, micro_batch_size=8)
        assert (foreseen.layout.teacher_shards, rows) == (1, 8)
        assert foreseen.layout.gathers_once
        agreed, rows = alike(Others(size=2), foreseen, rows)
        assert (agreed.layout.teacher_shards, rows) == (2, 2) and agreed.needs(2).teacher < foreseen.needs(2).teacher
        assert not agreed.layout.gathers_once
        assert alike(Team(), foreseen, 16)[0].layout == foreseen.layout

    def test_a_step_gathers_once_where_that_costs_no_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def once(memory: float, processes: int = 8, **settings: Any) -> bool:
            monkeypatch.setattr("cla_convert.training.micro_batch.device_memory", lambda _: int(memory))
            return foresee(LLAMA_8B, processes=processes, **settings)[0].layout.gathers_once

        both = {"micro_batch_size": 1, "shard_teacher": False, "batch_tokens": 2**16}
        forecast = Forecast(training(**both), LLAMA_8B, {**LLAMA_8B, "model_type": "llama"}, "cuda", Layout(8, 8))
        layouts = Layout(8, 8), Layout(8, 8, gathers_once=True)
        least, most = (forecast.among(layout).needs(1).peak + CONTEXT for layout in layouts)
        assert most > least + 35e9  # of 8e9 parameters 2 bytes, and 4 of gradients, of which an eighth was there
        assert once(most / 0.9 + 1, **both) and not once(most, **both)  # which would leave no tenth free
        assert not once(2 * most, gather="layer", **both) and not once(2 * most, 1, gather="step", **both)
        assert once(most, gather="step", **both)
        with pytest.raises(InputError, match="on each of 8 processes") as error:
            once(most - 1e6, gather="step", **both)
        assert f"What fits: train.gather=layer ({human_bytes(least)})" in error.value.fix
        assert "train.processes=16 train.gather=layer" in error.value.fix
        # of its own it makes no pass smaller; asked for, it may
        room = (forecast.among(layouts[1]).needs(1).peak + CONTEXT) / 0.9 + 1
        assert once(room, gather="step", **both | {"micro_batch_size": "auto", "batch_tokens": 2**20})
        rows = foresee(LLAMA_135M, processes=2, sequence_length=512, batch_tokens=2**20)[1]
        assert rows == foresee(LLAMA_135M, processes=2, sequence_length=512, batch_tokens=2**20, gather="layer")[1]

    def test_frozen_weights_of_a_whole_teacher_are_not_divided(self) -> None:
        """They are one copy either way: whole with the teacher, or a part for each process."""
        settings = {"parameters": "attention", "processes": 8}
        whole, _ = foresee(LLAMA_8B, **settings)
        divided, _ = foresee(LLAMA_8B, **settings, shard_teacher=True)
        trained, frozen = whole._counts
        assert whole.needs(1).weights == 4 * trained / 8 and whole.needs(1).teacher > 2 * frozen
        assert divided.needs(1).weights == (4 * trained + 2 * frozen) / 8

    def test_a_large_micro_batch_is_told_which_one_fits(self) -> None:
        with pytest.raises(InputError) as error:
            foresee(LLAMA_135M, micro_batch_size=128, batch_tokens=2**20)
        assert "train.micro_batch_size=32 (" in error.value.fix
        assert "train.activation_checkpointing=true (" in error.value.fix
        foresee(LLAMA_135M, micro_batch_size=32, batch_tokens=2**20)
        foresee(LLAMA_135M, micro_batch_size=128, batch_tokens=2**20, activation_checkpointing=True)

    def test_auto_takes_what_fits(self) -> None:
        assert foresee(LLAMA_135M)[1] == 16  # 32k tokens: more do not make a GPU faster
        foreseen, rows = foresee(LLAMA_8B, parameters="attention")
        assert rows == 2
        room = 85e9 * 0.9 - CONTEXT
        assert foreseen.needs(rows).peak <= room < foreseen.needs(2 * rows).peak
        assert foresee(LLAMA_135M, tokens=3 * 2048)[1] == 2

    def test_given_is_given(self) -> None:
        assert foresee(LLAMA_135M, micro_batch_size=3)[1] == 3
        assert foresee(LLAMA_135M, micro_batch_size=3, batch_tokens=4096)[1] == 2  # a step has no more
        cpu = Forecast(training(precision="float32"), LLAMA_135M, LLAMA_135M, "cpu")
        assert micro_batch_size(cpu) == 8


SIMULATED = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "head_dim": 64,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 16384, "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        (Layout(8, 8), {}),
        (Layout(8, 8), {"parameters": "attention"}),
        (Layout(8, 8), {"activation_checkpointing": True}),
        (Layout(8, 8, 8), {"micro_batch_size": 2}),
        (Layout(8, 8, 8), {"parameters": "attention"}),
        (Layout(16, 4), {}),
        (Layout(64, 64), {"sequence_length": 128}),  # what is gathered outweighs activations
        (Layout(64, 64, gathers_once=True), {"sequence_length": 128}),
        (Layout(2, 2, gathers_once=True), {"sequence_length": 128}),  # where the end of a step is near to the peak
        (Layout(8, 8, gathers_once=True), {}),
        (Layout(8, 8, 8, gathers_once=True), {"parameters": "attention"}),
    ],
    ids=str,
)
def test_many_processes_are_foreseen_as_simulated(layout: Layout, settings: dict[str, Any]) -> None:
    """The training's own code on fake tensors in a fake group of processes (benchmarks/simulated_memory.py)."""
    simulate = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "simulated_memory.py"))["simulate"]
    settings = {"micro_batch_size": 1, "sequence_length": 1024, "batch_tokens": 2**20, **settings}
    train = training(**settings)
    student = {**SIMULATED, "model_type": "cla_llama", "kv_source_layers": [0, 1, 1, 3, 3, 5]}
    foreseen = Forecast(train, student, SIMULATED, "cuda", layout).needs(settings["micro_batch_size"]).peak
    assert foreseen == pytest.approx(simulate(train, student, SIMULATED, layout), rel=0.06)


def test_a_failed_allocation_while_loading_is_an_error_with_a_reason() -> None:
    with pytest.raises(InputError, match="Memory ran out while the models were loaded"), loading():
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="mat1"), loading():
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_the_parts_that_are_named_add_up_to_what_is_promised() -> None:
    train = Train(tokens=4096, sequence_length=64, batch_tokens=64, precision="float32", compile=False)
    described = Forecast(train, LLAMA_135M, LLAMA_135M, "cpu", Layout(1, 1)).describe(1)
    assert f"libraries {human_bytes(CONTEXT)}" in described
