"""A conversion on several devices: each has a share of the rows, and the result is that of one."""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cla_convert.conversion import factories, reconstruction
from cla_convert.conversion.calibration import calibrated_pooling
from cla_convert.conversion.candidates import measure_maps
from cla_convert.conversion.convert import convert
from cla_convert.conversion.factories import WIDE_ENOUGH, devices_for
from cla_convert.conversion.initialisation import CalibrationText, LayerPatch
from cla_convert.conversion.plan import make_plan
from cla_convert.conversion.reconstruction import _shared_out
from cla_convert.conversion.sensitivity import Search, Sensitivity, measure_sensitivity
from cla_convert.conversion.sharing import sharing_map
from cla_convert.conversion.streams import Part, Store, batches, divided
from cla_convert.effort import Effort
from cla_convert.errors import InputError, Interrupted
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import load_model
from cla_convert.models.shape import shape_of
from tests.tiny import save_tiny, source_model

CASES = ["llama", "qwen3", "gemma3", "mixtral", "qwen3_next", "gpt_oss"]
SEARCH = Search(3, 4, Effort(3, 64), 8 * 32)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without bfloat16: rounding products and orthogonalised steps makes much of a last bit."""
    monkeypatch.setattr("cla_convert.conversion.blocks.has_native_bfloat16", lambda _: False)


@pytest.fixture
def tokens() -> Tensor:
    """Eleven rows: no number of devices divides them."""
    return torch.randint(2, 258, (11, 32), generator=torch.Generator().manual_seed(1))


def saved(model: PreTrainedModel, folder: Path) -> Checkpoint:
    model.save_pretrained(folder)
    return Checkpoint.open(folder)


def patches_of(source: Checkpoint, tokens: Tensor, device: str | Sequence[str], **settings) -> list[LayerPatch]:
    sources = sharing_map("cla2-keep-ends", shape_of(source.config).kinds)
    settings = {"effort": Effort(6, 96), "dtype": torch.float32} | settings
    return list(calibrated_pooling(source, source.config, sources, tokens, device=device, **settings))


def assert_alike(one: Sequence[LayerPatch], other: Sequence[LayerPatch], close: float) -> None:
    assert any(patch.tensors for patch in one) and len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert mine.tensors.keys() == theirs.tensors.keys()
        for name, tensor in mine.tensors.items():
            assert (theirs.tensors[name] - tensor).norm() <= close * tensor.norm(), name
        if mine.fit and theirs.fit:
            assert mine.fit.head_permutation == theirs.fit.head_permutation
            assert theirs.fit.mismatch == pytest.approx(mine.fit.mismatch, rel=100 * close)


def test_rows_are_shared_out_and_found_again() -> None:
    rows = torch.arange(7 * 2).view(7, 2)
    stream = divided(rows, 3)
    assert [len(share) for share in stream.shares] == [3, 2, 2] and stream.shape == (7, 2)
    chosen = torch.tensor([6, 0, 3])
    assert stream.rows(chosen, torch.device("cpu")).tolist() == [[0, 1], [6, 7], [12, 13]]
    assert divided(rows, 1).rows(chosen, torch.device("cpu")).tolist() == [[12, 13], [0, 1], [6, 7]]
    parts = list(batches(stream, 4))  # two rows at a time, the devices in turns
    assert [(part.device, part.rows.start, part.rows.stop) for part in parts] == [
        (0, 0, 2), (1, 0, 2), (2, 0, 2), (0, 2, 3)
    ]  # fmt: skip
    assert torch.cat([stream[part] for part in parts]).sort(0).values.equal(rows)
    copy = Store([torch.device("cpu")] * 3).empty(7, 2)
    copy.copy_(stream)
    copy[Part(2, slice(1, 2))] = torch.zeros(1, 2)
    assert torch.cat(list(copy.shares)).tolist() == [*rows[:6].tolist(), [0, 0]]


def test_every_parameter_has_one_device_that_moves_it() -> None:
    sizes = [16, 4, 4, 16, 16, 16, 1]
    shares = _shared_out(sizes, 2)
    assert sorted(i for share in shares for i in share) == list(range(7))
    assert sorted(sum(sizes[i] for i in share) for share in shares) == [36, 37]


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_one_device(
    case: str, devices: int, tokens: Tensor, tmp_path: Path, float32: None
) -> None:
    source = saved(source_model(case), tmp_path)
    assert_alike(patches_of(source, tokens, "cpu"), patches_of(source, tokens, ["cpu"] * devices), 2e-5)


@pytest.mark.parametrize("settings", [{"kv_heads": 1}, {"effort": Effort(6, 32)}, {"effort": Effort(0, 64)}])
def test_so_they_are_otherwise(settings: dict, tokens: Tensor, tmp_path: Path, float32: None) -> None:
    """Fewer heads; a step of fewer rows than there are devices; the closed form alone; on disk; more than rows."""
    source = saved(source_model("llama"), tmp_path)
    one = patches_of(source, tokens, "cpu", **settings)
    assert_alike(one, patches_of(source, tokens, ["cpu"] * 2, **settings), 2e-5)
    assert_alike(one, patches_of(source, tokens, ["cpu"] * 20, **settings), 2e-5)


def test_streams_on_disk_are_shared_too(tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, spill = saved(source_model("llama"), tmp_path / "source"), tmp_path / "spill"
    spill.mkdir()
    here = patches_of(source, tokens, ["cpu"] * 2)
    monkeypatch.setattr("cla_convert.conversion.streams.available_memory", lambda: 0)
    assert_alike(here, patches_of(source, tokens, ["cpu"] * 2, spill=spill), 0)


def test_rounded_steps_stay_close(tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cla_convert.conversion.blocks.has_native_bfloat16", lambda _: True)  # on any processor
    source = saved(source_model("llama"), tmp_path)
    one, two = (patches_of(source, tokens, ["cpu"] * count) for count in (1, 2))
    assert_alike(one, two, 0.01)
    assert [p.fit.mismatch for p in two if p.fit] == pytest.approx([p.fit.mismatch for p in one if p.fit], rel=2e-3)


def text(tokens: Tensor, devices: int, steps: int) -> CalibrationText:
    return CalibrationText(tokens, "", ["cpu"] * devices, steps=steps)


def test_one_whole_model_is_written(tokens: Tensor, tmp_path: Path, float32: None) -> None:
    source = Checkpoint.open(save_tiny("llama", tmp_path / "source"))
    plan = make_plan(source, sharing="cla2-keep-ends", init="calibrated")
    for devices in (1, 2):
        convert(plan, source, tmp_path / str(devices), calibration=text(tokens, devices, steps=0))
    one, two = (load_model(tmp_path / str(devices)).state_dict() for devices in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_what_is_interrupted_or_fails_leaves_nothing(tokens: Tensor, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted("Interrupted")

    source = Checkpoint.open(save_tiny("llama", tmp_path / "source"))
    plan, before = make_plan(source, sharing="cla2-keep-ends", init="calibrated"), signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(Interrupted):
            convert(plan, source, tmp_path / "out", calibration=text(tokens, 2, steps=10_000))
    finally:
        signal.signal(signal.SIGALRM, before)
    model = load_model(source.folder)
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    broken = Checkpoint.open(tmp_path / "broken")
    with pytest.raises(InputError, match="not finite"):
        convert(plan, broken, tmp_path / "out", calibration=text(tokens, 2, steps=0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "source"]


def found(measure: Callable[..., list[Sensitivity]], source: Checkpoint, what: list, tokens: Tensor, devices: int):
    device = ["cpu"] * devices
    entries = measure(source, source.config, what, torch.cat([tokens] * 2), search=SEARCH, device=device)
    return {entry.layers: [entry.kl, entry.delta_nll] for entry in entries}


def test_candidates_cost_what_they_do_on_one_device(tokens: Tensor, tmp_path: Path, float32: None) -> None:
    source = saved(source_model("llama"), tmp_path)
    kinds, maps = shape_of(source.config).kinds, [[0, 0, 2, 2, 4, 4], [0, 1, 1, 1, 4, 5]]
    for measure, what in ((measure_sensitivity, list(kinds)), (measure_maps, maps)):
        one, two = (found(measure, source, what, tokens, devices) for devices in (1, 2))
        assert len(one) >= 2 and two.keys() == one.keys()
        for layers, costs in one.items():
            assert two[layers] == pytest.approx(costs, rel=1e-4, abs=1e-5)


def test_all_gpus_are_used_where_the_model_is_wide_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factories.torch.cuda, "device_count", lambda: 4)
    four = [f"cuda:{number}" for number in range(4)]
    assert devices_for("cuda", WIDE_ENOUGH, 100) == four and devices_for("cuda", WIDE_ENOUGH, 2) == four[:2]
    assert devices_for("cuda", WIDE_ENOUGH - 1, 100) == ["cuda"]
    for named in ("cpu", "cuda:1", "mps"):
        assert devices_for(named, 8192, 100) == [named]
    assert devices_for(["cpu", "cpu"], 64, 1) == ["cpu"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("record", [0, 100])
@pytest.mark.parametrize("case", CASES)
def test_two_gpus_give_what_one_gives(
    case: str, record: int, tokens: Tensor, tmp_path: Path, float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed steps and plain ones; streams are bfloat16 there."""
    monkeypatch.setattr(reconstruction, "_WORTH_RECORDING", record)
    source = saved(source_model(case), tmp_path)
    one, two = (patches_of(source, tokens, [f"cuda:{n}" for n in range(count)], effort=Effort(8, 96))
                for count in (1, 2))  # fmt: skip
    assert_alike(one, two, 0.01)
