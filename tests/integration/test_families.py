"""Every family from a checkpoint to a converted model that loads without this package."""

import json
from pathlib import Path

import pytest
import torch

from cla_convert.conversion.convert import convert
from cla_convert.conversion.plan import make_plan
from cla_convert.evaluation.cache import measure_kv_cache
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import export_model, load_model
from cla_convert.models.families import FAMILIES
from cla_convert.models.shape import owners_of
from cla_convert.models.verify import verify_models
from tests.launch import cla
from tests.tiny import CASES, save_tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Case -> source and converted folder."""
    made = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp(case)
        source = Checkpoint.open(save_tiny(case, folder / "source"))
        plan = make_plan(source, sharing="cla2-keep-ends", init="mean")
        convert(plan, source, folder / "converted")
        made[case] = folder / "source", folder / "converted"
    return made


def test_outputs_load_where_cla_convert_is_not_installed(folders):
    results = verify_models([converted for _, converted in folders.values()])
    for case, result in zip(folders, results, strict=True):
        config = json.loads((folders[case][1] / "config.json").read_text())
        assert result["ok"] and result["cached_layers"] == len(owners_of(config["kv_source_layers"])) < 6
        assert result["tokens"] > (config.get("sliding_window") or 0) or not config.get("use_sliding_window", True)


@pytest.mark.parametrize("case", CASES)
def test_projections_are_pooled_and_everything_else_is_kept(case, folders):
    family = FAMILIES[CASES[case][0]]
    source, converted = (Checkpoint.open(folder) for folder in folders[case])
    sources = converted.config["kv_source_layers"]
    for name in source.tensors:
        place = family.place(name)
        if place is None or place.module not in family.kv_modules:
            assert torch.equal(converted.read(name), source.read(name)), name
        elif sources[place.layer] != place.layer:
            assert name not in converted.tensors
        else:
            group = [layer for layer, owner in enumerate(sources) if owner == place.layer]
            members = [source.read(family.tensor(layer, *place[1:])) for layer in group]
            torch.testing.assert_close(converted.read(name), torch.stack(members).mean(0))


@pytest.mark.parametrize("case", ["gemma3", "phi3-partial", "gpt_bigcode"])
def test_the_cache_that_is_measured_is_the_one_that_is_planned(case, folders):
    """At 64 and 128 tokens a window of 8 is full: only full layers still grow, by their own bytes per token."""
    source, converted = (measure_kv_cache(folder, device="cpu") for folder in folders[case])
    plan = make_plan(Checkpoint.open(folders[case][0]), sharing="cla2-keep-ends", init="mean")
    owners = [plan.shape.kinds[layer] for layer in set(plan.kv_source_layers)]
    per_layer = plan.shape.kv_bytes_per_token(4, 1)
    assert source["bytes_per_token"] == per_layer * plan.shape.kinds.count("full_attention")
    assert converted["bytes_per_token"] == per_layer * owners.count("full_attention")
    assert converted["full_layers"] == converted["sliding_layers"] == owners.count("sliding_attention")
    assert (source["cached_layers"], converted["cached_layers"]) == (6, len(owners))


@pytest.mark.parametrize("which", [0, 1], ids=["source", "converted"])
@pytest.mark.parametrize("case", ["phi3", "gpt_bigcode", "mixtral", "qwen3_moe", "granitemoe", "glm4_moe", "gpt_oss"])
def test_training_exports_projections_and_experts_as_they_are_stored(case, which, folders, tmp_path):
    folder = folders[case][which]
    model = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    export_model(model, folder, tmp_path / "trained")
    ids = torch.arange(2, 22)[None]
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / "trained")(ids).logits, model(ids).logits)


def test_unsupported_forms_are_refused_before_work_begins(tmp_path):
    folder = save_tiny("gpt_bigcode", tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"multi_query": False}))
    for verb in (["convert", folder, tmp_path / "out"], ["convert", folder, tmp_path / "out", "--dry-run"]):
        done = cla(*verb)
        assert done.returncode == 3 and "multi-head attention" in done.stderr and "StarCoder" in done.stderr
    assert not (tmp_path / "out").exists()
