"""Models that are divided among processes: a teacher too, and never a whole one in the memory of any process."""

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cla_convert.files import read_rows
from cla_convert.recipe_file import load_recipe

from ..conftest import save_tiny_llama
from ..launch import CONTEXT, finish, free_port, prepare, start, start_team, uptrain
from ..tiny import save_tiny

STEPS = 2.4
M_MMAP_THRESHOLD = -3
"""Of malloc.h: from this size on an allocation is a mapping of its own."""


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Converted models: with a head of its own, tied, and with experts, whose stacks are few rows."""
    folder = tmp_path_factory.mktemp("sharding")
    saved = {
        "untied": save_tiny_llama(folder / "untied" / "source", tie_word_embeddings=False),
        "tied": save_tiny_llama(folder / "tied" / "source"),
        "experts": save_tiny("mixtral", folder / "experts" / "source"),
    }
    return {name: prepare(folder / name, source) for name, source in saved.items()}


def trained(work: Path, out: Path, size: int, **options: Any) -> tuple[dict[str, torch.Tensor], list[float], str]:
    """Weights, losses and what was said by so many processes."""
    log = out.with_suffix(".log")
    line = uptrain(work, out, steps=STEPS, validate_every=0, **options)
    assert finish(*start_team(line, log, size)) == [0] * size, log.read_text()
    rows = read_rows(out.with_name(f"{out.name}.state") / "metrics.jsonl")
    return load_file(out / "model.safetensors"), [row["loss"] for row in rows if "loss" in row], log.read_text()


@pytest.mark.parametrize(
    ("case", "size", "options"),
    [
        ("untied", 2, {}),
        ("untied", 2, {"parameters": "attention"}),
        ("untied", 3, {"parameters": "shared", "hidden_weight": 0}),  # 258 rows and 64 do not divide by 3
        ("tied", 2, {"parameters": "attention", "activation_checkpointing": True}),
        ("experts", 2, {"parameters": "attention"}),
    ],
)
def test_a_divided_teacher_teaches_the_same(
    works: dict[str, Path], tmp_path: Path, case: str, size: int, options: dict[str, Any]
) -> None:
    whole = trained(works[case], tmp_path / "whole", size, shard_teacher=False, **options)
    divided = trained(works[case], tmp_path / "divided", size, shard_teacher=True, **options)
    assert divided[1] == pytest.approx(whole[1], rel=1e-5) and len(whole[1]) == 3
    for name, tensor in whole[0].items():
        torch.testing.assert_close(divided[0][name], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()))
    shared = [line for _, _, log in (whole, divided) for line in log.splitlines() if "of frozen weights" in line]
    assert len(shared) == (2 if "parameters" in options else 0) and len(set(shared)) <= 1


def test_a_divided_teacher_computes_in_bfloat16(works: dict[str, Path], tmp_path: Path) -> None:
    options = {"precision": "bfloat16", "parameters": "attention"}
    whole = trained(works["untied"], tmp_path / "whole", 2, shard_teacher=False, **options)
    divided = trained(works["untied"], tmp_path / "divided", 2, shard_teacher=True, **options)
    assert divided[1] == pytest.approx(whole[1], rel=1e-5)


def test_frozen_experts_come_out_as_they_were(works: dict[str, Path], tmp_path: Path) -> None:
    """Their files hold them one by one in float32, the model stacked, here in bfloat16."""
    out, log = tmp_path / "out", tmp_path / "log"
    line = uptrain(works["experts"], out, steps=1, precision="bfloat16", parameters="attention")
    assert finish(start(line, log)) == [0], log.read_text()
    before, after = (load_file(f / "model.safetensors") for f in (works["experts"] / "converted", out))
    experts = {name for name in before if "experts" in name}
    assert len(experts) == 6 * 4 * 3 and all(torch.equal(before[name], after[name]) for name in experts)
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


class TestMemory:
    """Of each of two processes, beside what Python had before: peaks that the kernel recorded."""

    LAYERS = 24
    LAYER = 3 * 512 * 2048 * 4
    """Bytes of a layer's MLP in float32; the rest is small."""
    AT_A_TIME = 6 * LAYER + 40_000_000
    """What FSDP2 gathers of two layers, before and after it cuts it into tensors; imports, tokens, activations."""

    @pytest.fixture(scope="class")
    def large(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """300 MB in float32."""
        folder = tmp_path_factory.mktemp("large")
        shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": self.LAYERS}
        return prepare(folder, save_tiny_llama(folder / "source", **shape))

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            ({"loss": "cross_entropy"}, 1),  # halves of the float32 weights
            ({"shard_teacher": True}, 2),  # the teacher's halves too
            ({"shard_teacher": True, "parameters": "attention"}, 1),  # and its MLPs are the student's
        ],
    )
    def test_no_process_ever_holds_a_whole_model(
        self, large: Path, tmp_path: Path, options: dict[str, Any], parts: int
    ) -> None:
        peaks = measured(large, tmp_path, options, size=2)
        halves = parts * self.LAYERS * self.LAYER / 2
        for peak in peaks:
            assert halves < peak["loading"] < halves + self.AT_A_TIME, peaks
            assert peak["publishing"] < 4 * self.LAYER, peaks
        self.assert_unchanged(large, tmp_path / "out")

    def test_a_process_alone_needs_the_model_and_little_more(self, large: Path, tmp_path: Path) -> None:
        (peak,) = measured(large, tmp_path, {"loss": "cross_entropy"}, size=1)
        whole = self.LAYERS * self.LAYER
        assert whole < peak["loading"] < whole + self.AT_A_TIME, peak
        assert peak["publishing"] < 4 * self.LAYER, peak
        self.assert_unchanged(large, tmp_path / "out")

    def assert_unchanged(self, work: Path, out: Path) -> None:
        stored, published = (load_file(folder / "model.safetensors") for folder in (work / "converted", out))
        assert stored.keys() == published.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in published.items())


def measured(work: Path, folder: Path, options: dict[str, Any], *, size: int) -> list[dict[str, int]]:
    """What loading the models and publishing the student took in each process, bytes."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    places = [{name: str(value) for name, value in {**common, "RANK": i, "LOCAL_RANK": i}.items()} for i in range(size)]
    processes = [CONTEXT.Process(target=measure, args=(work, folder, options, place)) for place in places]
    for process in processes:
        process.start()
    assert finish(*processes) == [0] * size
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def measure(work: Path, folder: Path, options: dict[str, Any], environment: dict[str, str]) -> None:
    """In a process of its own: load, publish, and write the peaks to a file."""
    from cla_convert.training.parallel import team
    from cla_convert.training.publish import publish, result_of
    from cla_convert.training.state import Position, TrainingStates
    from cla_convert.training.trainer import set_up

    os.environ.update(environment)
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)  # what is freed goes back to the kernel at once
    settings = {"tokens": 32, "batch_tokens": 32, **options}
    sets = [f"train.{name}={json.dumps(value)}" for name, value in settings.items()]
    recipe = load_recipe(work / "recipe.yaml", sets).recipe
    with team("cpu") as crew:
        before = forget_peak()
        trainer = set_up(work / "converted", work / "source", recipe, "cpu", crew)
        peaks = {"loading": peak() - before}
        crew.barrier()
        before = forget_peak()
        result = result_of(trainer, Position(1, 32, 1.0, 1.0, 1.0), [], TrainingStates(folder / "states", {}, 1))
        publish(trainer, work / "converted", folder / "out", result, {})
        peaks["publishing"] = peak() - before
    (folder / f"{crew.rank}.json").write_text(json.dumps(peaks))


def forget_peak() -> int:
    """Let the kernel record the largest resident set anew; what it is now, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak() -> int:
    return resident("VmHWM")


def resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))
