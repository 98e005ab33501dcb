"""A new family is one row: that of tests/additions, generated into a scratch package and used like our own."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cla_convert.conversion.convert import convert
from cla_convert.conversion.plan import make_plan
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import load_model
from cla_convert.models.families import FAMILIES
from cla_convert.models.generate import write
from cla_convert.models.verify import verify_models
from tests import tiny
from tests.additions.helium import helium


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Helium, now that there is a row for it; the row is gone again afterwards."""
    folder = tmp_path / "scratch_families"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    family = helium(folder.name, folder)
    write(family)
    monkeypatch.setitem(FAMILIES, family.model_type, family)
    monkeypatch.setitem(tiny.CASES, "helium", ("helium", {}))
    return tiny.save_tiny("helium", tmp_path / "source")


def test_a_new_family_converts(source: Path, tmp_path: Path) -> None:
    """With the identity map it is the source exactly; with cla2, half the cache, loadable without us."""
    checkpoint, ids = Checkpoint.open(source), torch.arange(2, 26)[None]
    for sharing in ("cla1", "cla2"):
        convert(make_plan(checkpoint, sharing=sharing, init="mean"), checkpoint, tmp_path / sharing)
    model = load_model(tmp_path / "cla1", dtype=torch.float32)
    assert type(model).__name__ == "ClaHeliumForCausalLM" and type(model).__module__.startswith("scratch_families.")
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits
        assert torch.equal(model(ids).logits, expected)
    (result,) = verify_models([tmp_path / "cla2"])
    assert result["ok"] and result["cached_layers"] == 3
