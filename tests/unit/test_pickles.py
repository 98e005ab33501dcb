"""Pickled weights as people have them: wrapped, with numbers beside them, of odd types, in an old format."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cla_convert.errors import InputError
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.source import resolve_source
from tests.tiny import save_tiny, source_model

STATE = source_model("llama").state_dict()


def pickled(folder: Path, value: Any, name: str = "pytorch_model.bin", **options: Any) -> Path:
    if not (folder / "config.json").exists():
        save_tiny("llama", folder)
        (folder / "model.safetensors").unlink()
    torch.save(value, folder / name, **options)
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(resolve_source(str(folder), allow_pickle=True))
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "value",
    [
        {"state_dict": STATE, "epoch": 3},
        {"model": {"state_dict": STATE}, "optimizer": {"state": {}}},
        {**STATE, "step": 3, "note": "hello"},
        {**STATE, "freqs_cis": torch.zeros(4, dtype=torch.complex64), 7: torch.ones(2)},
        {**STATE, "sparse": torch.ones(2, 2).to_sparse()},
    ],
    ids=["wrapped", "wrapped twice", "numbers", "odd types", "sparse"],
)
def test_weights_are_found(value, tmp_path, capsys):
    assert same(read(pickled(tmp_path / "m", value)), STATE)
    left_out = {"step", "freqs_cis", "sparse"} & value.keys()
    assert all(name in capsys.readouterr().err for name in left_out)


def test_the_old_format(tmp_path):
    assert same(read(pickled(tmp_path / "m", STATE, _use_new_zipfile_serialization=False)), STATE)


def test_of_two_sets_the_one_that_transformers_loads(tmp_path):
    folder = pickled(tmp_path / "m", STATE)
    other = {name: tensor + 1 for name, tensor in STATE.items()}
    pickled(folder, other, "pytorch_model-00001-of-00001.bin")
    pickled(folder, other, "pytorch_model.fp32.bin")
    assert same(read(folder), STATE)


@pytest.mark.parametrize("value", [[1, 2], {"epoch": 3}, torch.ones(3)], ids=["list", "no tensors", "a tensor"])
def test_what_holds_no_weights_is_refused(value, tmp_path):
    with pytest.raises(InputError, match="holds no weights"):
        read(pickled(tmp_path / "m", value))
