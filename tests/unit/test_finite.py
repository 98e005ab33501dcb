"""NaN and infinity are found while bytes are copied, in tensors of every kind; the error says where they are from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cla_convert.conversion.convert import convert
from cla_convert.conversion.initialisation import CalibrationText
from cla_convert.conversion.plan import make_plan
from cla_convert.errors import InputError, NotFiniteError
from cla_convert.models import finite, writer
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import export_model
from cla_convert.models.finite import naming_not_finite
from cla_convert.models.headers import FLOATING, TORCH_NAMES
from cla_convert.models.writer import ShardWriter

from ..tiny import save_tiny

LARGEST = 12345


def copied(tmp_path: Path, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor after it went from file to file, behind one byte that spoils its alignment there."""
    tmp_path.mkdir(exist_ok=True)
    save_file({"t": tensor, "u": torch.ones(1, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source, out = Checkpoint.open(tmp_path), tmp_path / "out"
    out.mkdir()
    shards = ShardWriter(out, source.tensors, max_shard_size=10**9)
    for name, info in source.tensors.items():
        shards.copy(name, source.folder / info.file, info.start)
    return load_file(out / "model.safetensors")["t"]


@pytest.mark.parametrize("in_the_kernel", [True, False])
@pytest.mark.parametrize("code", FLOATING)
def test_every_float_wherever_it_stands(code, in_the_kernel, tmp_path, monkeypatch):
    """Also behind the first block and the first chunk, and next to the largest numbers that there are."""
    monkeypatch.setattr(finite, "_BLOCK", 1 << 12)
    monkeypatch.setattr(writer, "_CHUNK", 1 << 14)
    if not in_the_kernel:
        monkeypatch.delattr("os.copy_file_range", raising=False)
    dtype = getattr(torch, FLOATING[code])
    largest = torch.finfo(dtype)
    tensor = torch.linspace(-1, 1, LARGEST, dtype=torch.float64).to(dtype)
    tensor[7], tensor[8], tensor[9] = largest.max, largest.min, largest.smallest_normal / 2
    assert torch.equal(copied(tmp_path / "fine", tensor), tensor)
    for number, (place, value) in enumerate([(0, "nan"), (5000, "inf"), (LARGEST - 1, "-inf"), (9000, "-nan")]):
        spoiled = tensor.clone()
        spoiled[place] = float(value)
        with pytest.raises(NotFiniteError, match="t holds NaN or infinity"):
            copied(tmp_path / str(number), spoiled)


def test_whole_numbers_have_no_infinity(tmp_path):
    for code in TORCH_NAMES.keys() - FLOATING.keys() - {"BOOL"}:
        dtype = getattr(torch, TORCH_NAMES[code])
        tensor = torch.full((9,), torch.iinfo(dtype).max, dtype=dtype)
        assert torch.equal(copied(tmp_path / code, tensor), tensor)


def test_what_the_system_copies_in_part_is_continued_at_a_whole_number(tmp_path, monkeypatch):
    """A network disk stops where it likes."""
    given = []

    def some(reader: int, to: int, count: int) -> int:
        import os

        if given:
            raise OSError(18, "no more")
        given.append(count)
        return os.write(to, os.read(reader, 1001))

    monkeypatch.setattr("os.copy_file_range", some, raising=False)
    tensor = torch.arange(4000.0)
    assert torch.equal(copied(tmp_path, tensor), tensor) and given


NAMES = [
    "model.embed_tokens.weight", "model.norm.weight", "model.layers.3.mlp.up_proj.weight",
    "model.layers.2.input_layernorm.weight", "model.layers.4.self_attn.k_proj.weight",
    "model.layers.3.self_attn.v_proj.weight", "model.layers.3.self_attn.q_proj.weight",
    "model.layers.5.self_attn.o_proj.weight",
]  # fmt: skip


@pytest.mark.parametrize("init", ["mean", "calibrated"])
@pytest.mark.parametrize("name", NAMES)
def test_the_tensor_that_holds_it_is_named_whatever_stumbles_over_it(name, init, tmp_path):
    """Of what calibration computes of a NaN, SciPy, torch and we complain, each in words of its own."""
    folder = save_tiny("llama", tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[-3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    source = Checkpoint.open(folder)
    text = CalibrationText(torch.randint(2, 258, (2, 64)), "", steps=1) if init == "calibrated" else None
    with pytest.raises(InputError, match="The weights in .* are not finite") as caught:
        convert(make_plan(source, sharing="cla2", init=init), source, tmp_path / "out", calibration=text)
    assert name in caught.value.why and "more" not in caught.value.why
    assert not (tmp_path / "out").exists()


def test_training_is_not_lost_for_what_was_not_looked_at_before(tmp_path):
    """Outputs of earlier versions can hold a NaN where training never comes: it stays, and nothing is refused."""
    source = Checkpoint.open(save_tiny("llama", tmp_path / "m"))
    convert(make_plan(source, sharing="cla2", init="mean"), source, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    trained = {name: tensor + 1 for name, tensor in weights.items() if name != "model.norm.weight"}
    export_model(trained, template=tmp_path / "out", out=tmp_path / "new", unchanged=["model.norm.weight"])
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert found["model.norm.weight"].isnan().tolist() == weights["model.norm.weight"].isnan().tolist()
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no kernel")])
def test_other_failures_are_told_as_they_are(error, tmp_path):
    """All of a large model would be read, and what no model uses could be blamed."""
    folder = save_tiny("llama", tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("inf")
    weights["model.layers.0.left_over"] = torch.tensor([float("nan")])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(type(error), match=str(error)), naming_not_finite(Checkpoint.open(folder), ()):
        raise error
    named = pytest.raises(InputError, match="The weights in .* are not finite")
    with named as caught, naming_not_finite(Checkpoint.open(folder), ["model.layers.0.left_over"]):
        raise NotFiniteError("activations")
    assert "model.norm.weight." in caught.value.why and "left_over" not in caught.value.why
