"""Windows that config.json names and the family knows nothing of: transformers' caches would believe in them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cla_convert.conversion.convert import convert
from cla_convert.conversion.plan import make_plan
from cla_convert.models import kinds
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import load_model
from cla_convert.models.families import FAMILIES
from cla_convert.models.verify import verify_model
from tests.tiny import CASES, save_tiny

WINDOW, NEW = 8, 24
STRAYS = {"sliding_window": {"sliding_window": WINDOW}, "attention_chunk_size": {"attention_chunk_size": WINDOW}}
LISTED = {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": WINDOW}
FULL = [case for case, (family, _) in CASES.items() if FAMILIES[family].kinds is kinds.full]


def saved(case: str, folder: Path, strays: dict[str, Any]) -> Path:
    path = save_tiny(case, folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | strays))
    return folder


def answer(folder: Path, **options: Any) -> list[list[int]]:
    """Greedy, to three times the window."""
    ids = torch.randint(2, 258, (2, 5), generator=torch.Generator().manual_seed(3))
    return (
        load_model(folder, dtype=torch.float32)
        .generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)
        .tolist()
    )


def converted(source: Path, out: Path, sharing: str) -> Path:
    checkpoint = Checkpoint.open(source)
    convert(make_plan(checkpoint, sharing=sharing, init="mean"), checkpoint, out)
    return out


@pytest.mark.parametrize("case", FULL)
def test_a_model_without_windows_answers_as_without_a_cache(case: str, tmp_path: Path):
    """And so does its source where it is measured: what a text is scored by is what `generate` goes on with."""
    source = saved(case, tmp_path / "source", STRAYS["sliding_window"])
    expected = answer(source, use_cache=False)
    assert answer(source) == expected
    assert answer(converted(source, tmp_path / "same", "cla1")) == expected
    shared = converted(source, tmp_path / "shared", "cla2")
    assert answer(shared) == answer(shared, use_cache=False)


@pytest.mark.parametrize(
    ("case", "strays"),
    [
        ("llama", STRAYS["attention_chunk_size"]),
        ("llama", LISTED),
        ("mixtral", {"layer_types": ["full_attention"] * 6}),
    ],
    ids=str,
)
def test_other_keys_that_a_cache_believes_in(case: str, strays: dict, tmp_path: Path):
    source = saved(case, tmp_path / "source", strays)
    expected = answer(source, use_cache=False)
    assert answer(source) == expected
    assert answer(converted(source, tmp_path / "same", "cla1")) == expected


def test_the_output_loads_anywhere_without_them(tmp_path: Path):
    source = saved("llama", tmp_path / "source", LISTED)
    checkpoint = Checkpoint.open(source)
    plan = make_plan(checkpoint, sharing="cla2", init="mean")
    assert any("layer_types and sliding_window, which a llama knows nothing of" in told for told in plan.warnings)
    convert(plan, checkpoint, tmp_path / "out")
    assert not LISTED.keys() & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
    assert verify_model(tmp_path / "out")["ok"]


def test_what_a_family_reads_stays(tmp_path: Path):
    for case in ("mistral-window", "gemma3", "qwen2", "ministral"):
        folder = save_tiny(case, tmp_path / case)
        said = json.loads((folder / "config.json").read_text())
        assert Checkpoint.open(folder).config == said
