"""What a plan says of disk is what lies there in the end, and what the check before the work asks for."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cla_convert import pipeline
from cla_convert.conversion.plan import NO_LAYER_SHARES
from cla_convert.errors import InputError
from cla_convert.recipe_file import load_recipe
from cla_convert.run_folder import RunFolder
from cla_convert.stages.disk import disk_of
from cla_convert.stages.plan import bound, plan_of

SMALL = [
    "convert.init=mean", "train.tokens=1k", "train.sequence_length=64", "train.batch_tokens=128", "device=cpu",
    "train.validation_tokens=64", "train.keep_checkpoints_after_success=true", "eval.tasks=[arc_easy]", "eval.limit=1",
    "eval.domain_tokens=0", "eval.prompts=[]",
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own: what lies in it counts."""
    monkeypatch.setenv("CLA_CONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wanted(model: Path, *settings: str) -> Any:
    return load_recipe(None, [*SMALL, *settings], {"source.model": str(model)}).recipe


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "settings",
    [
        ["train.checkpoint_every=0"],
        ["train.checkpoint_every=256", "train.keep_checkpoints=3", "train.parameters=attention"],
        ["train.parameters=shared", "source.dtype=bfloat16"],
        ["train.control=true", "train.cross_entropy_weight=0.5"],
    ],
)
def test_the_disk_of_a_plan_is_what_lies_there(tiny_llama: Path, tmp_path: Path, cache: Path, settings) -> None:
    recipe, out = wanted(tiny_llama, *settings), tmp_path / "run"
    planned = disk_of(recipe, RunFolder(out), plan_of(recipe, RunFolder(out)))
    pipeline.run(recipe, out, until="uptrain")
    models = size(out) - sum(file.stat().st_size for file in out.glob("*.json*"))
    written = sum(planned.parts.values()) - planned.parts["records"]
    assert models == pytest.approx(written, rel=0.15)
    assert 0 < planned.tokens_left <= 2 * max(size(folder) for folder in (cache / "tokens").iterdir())
    done = disk_of(recipe, RunFolder(out), plan_of(recipe, RunFolder(out)))
    assert done.needed < written / 20 and not done.tokens_left


def test_what_lies_there_counts_where_it_stays(tiny_llama: Path, tmp_path: Path, cache: Path) -> None:
    recipe, out = wanted(tiny_llama, "train.checkpoint_every=256", "train.keep_checkpoints=2"), tmp_path / "run"
    folder = RunFolder(out)
    pipeline.run(recipe, out, until="uptrain")
    the_plan = plan_of(recipe, folder)
    fresh, done = disk_of(recipe, folder, the_plan, anew=True), disk_of(recipe, folder, the_plan)
    models = sum(map(size, (folder.converted, folder.training.model, folder.training.checkpoints)))
    assert done.there == models and sum(done.parts.values()) - done.parts["records"] == pytest.approx(models, rel=0.01)
    (kept,) = (bytes_ for name, bytes_ in done.parts.items() if name == "checkpoints of uptrained")
    assert kept == size(folder.training.checkpoints) and "checkpoints of uptrained" in done.describe()
    assert fresh.needed < models  # anew: in the place of what is there
    moved = size(folder.converted)
    folder.converted.rename(tmp_path / "elsewhere")
    folder.converted.symlink_to(tmp_path / "elsewhere")  # of a link, what it leads to stays
    linked = disk_of(recipe, folder, the_plan, anew=True)
    assert linked.there == fresh.there - moved and disk_of(recipe, folder, the_plan).there == done.there
    assert fresh.tokens_left == done.tokens_left == 0  # whose text is in the cache, for another run of it, too
    assert not disk_of(recipe, RunFolder(tmp_path / "other"), the_plan).tokens_left
    shutil.rmtree(cache / "tokens")
    assert disk_of(recipe, folder, the_plan, anew=True).tokens_left > 0


def test_activations_that_no_memory_holds_are_counted(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("cla_convert.conversion.streams.places_for", lambda *_: None)
    name, needed = "what matching keeps of the text", {}
    for sharing in ("cla2", "cla3", "auto"):
        recipe = wanted(tiny_llama, "convert.init=calibrated", f"convert.sharing={sharing}", "train.tokens=0")
        folder = RunFolder(tmp_path / sharing)
        needed[sharing] = disk_of(recipe, folder, bound(recipe, folder, anew=False)).parts[name]
    assert needed["cla2"] < needed["cla3"] <= needed["auto"]  # of which nothing is known yet
    blind = wanted(tiny_llama, "train.tokens=0")
    assert name not in disk_of(blind, RunFolder(tmp_path), plan_of(blind, RunFolder(tmp_path))).parts


@pytest.mark.parametrize("parameters", ["all", "shared"])
def test_a_dry_run_samples_nothing(tiny_llama: Path, tmp_path: Path, capsys, monkeypatch, parameters: str) -> None:
    """Nor does it hash all weights, to see what was sampled before."""
    monkeypatch.setattr("cla_convert.training.sampling.fingerprint", None)
    settings = ["convert.init=calibrated", "data.sources=[{generate: {length: 64}}]", f"train.parameters={parameters}"]
    for sharing, owners, chosen in (("auto", 6, False), ("cla2", 3, True)):
        recipe = wanted(tiny_llama, *settings, f"convert.sharing={sharing}")
        the_plan = pipeline.dry_run(recipe, tmp_path / "run", overwrite=False, allow_changes=())
        assert len(the_plan.groups) == owners and ("training " in capsys.readouterr().err) is chosen
        warnings = the_plan.to_json()["warnings"]
        assert any("has not chosen yet" in warning for warning in warnings) is not chosen
        assert NO_LAYER_SHARES not in warnings
    assert not list(tmp_path.rglob("*.npz"))


def test_a_cache_on_another_disk_is_looked_at_by_itself(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    recipe, folder = wanted(tiny_llama), RunFolder(tmp_path / "run")
    disk = disk_of(recipe, folder, plan_of(recipe, folder))
    monkeypatch.setattr("cla_convert.stages.disk._disk_of", lambda place: place)
    real, free = shutil.disk_usage(tmp_path), {"run": disk.needed, "tokens": disk.tokens_left}
    monkeypatch.setattr("cla_convert.stages.disk.cache_of", lambda name: tmp_path / "cache" / name)
    (tmp_path / "cache" / "tokens").mkdir(parents=True)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda place: real._replace(free=free["tokens" if place.name == "tokens" else "run"])
    )
    disk.check(folder.path)
    for name, said in (("tokens", "Tokens of the text need"), ("run", "The run needs")):
        free[name] -= 1
        with pytest.raises(InputError, match=said):
            disk.check(folder.path)


def test_the_check_and_the_plan_say_the_same(tiny_llama: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    recipe, folder = wanted(tiny_llama), RunFolder(tmp_path / "run")
    disk = disk_of(recipe, folder, plan_of(recipe, folder))
    free = disk.needed + disk.tokens_left
    real, at = shutil.disk_usage(tmp_path), {"free": free}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=at["free"]))
    pipeline.dry_run(recipe, folder.path, overwrite=False, allow_changes=())
    assert disk.describe() in capsys.readouterr().err
    at["free"] = free - 1
    with pytest.raises(InputError, match="too small"):
        pipeline.dry_run(recipe, folder.path, overwrite=False, allow_changes=())


def test_the_disk_of_a_map_that_is_not_chosen_yet_is_that_of_the_largest(
    tiny_llama: Path, tmp_path: Path, capsys
) -> None:
    recipe = wanted(tiny_llama, "convert.sharing=auto", "convert.init=calibrated")
    the_plan = bound(recipe, RunFolder(tmp_path / "run"), anew=False)
    assert the_plan.parameters["before"] == the_plan.parameters["after"]
    measured = ["convert.sharing=auto", "convert.init=calibrated", "convert.kv_budget=0.5"]
    recipe = wanted(tiny_llama, *measured, "convert.calibration.tokens=2560")
    pipeline.run(recipe, tmp_path / "run", until="convert")
    made = bound(recipe, RunFolder(tmp_path / "run"), anew=False)
    assert made.parameters["after"] < made.parameters["before"]  # that which lies there
    again = bound(recipe, RunFolder(tmp_path / "run"), anew=True)
    assert again.parameters["before"] == again.parameters["after"]
    capsys.readouterr()
    # of text that is there, a dry run measures; so it knows what is trained
    assert pipeline.dry_run(recipe, tmp_path / "other", overwrite=False, allow_changes=()).choice
    assert "\ntraining " in capsys.readouterr().err


def test_a_plan_says_how_often_a_budget_goes_round_the_text(tiny_llama: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "text.txt").write_text("Some text. " * 1000)
    recipe = wanted(tiny_llama, f"data.sources=[{{path: {tmp_path / 'text.txt'}}}]", "train.tokens=110k")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "tokens": 128, "tokens_per_second": 100.0}\n')
    RunFolder(tmp_path / "run").save_recipe(recipe)
    pipeline.dry_run(recipe, tmp_path / "run", overwrite=False, allow_changes=())
    said = capsys.readouterr().err
    assert "110k tokens, 10 passes over about 11k tokens of text, about 18:20 at the 100 tokens/s" in said
    assert "warning: 10 passes over about 11k tokens of text" in said and "Give more text" in said


def test_a_folder_that_takes_no_files_is_not_called_too_small() -> None:
    from cla_convert.models.writer import check_disk

    if not Path("/proc/self").exists():
        pytest.skip("Linux'")
    with pytest.raises(InputError, match="Nothing can be written below /proc"):
        check_disk(Path("/proc/there"), 10)


def test_a_disk_that_is_read_only_is_refused(tmp_path: Path, monkeypatch) -> None:
    from cla_convert.models.writer import check_disk

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=10**9))
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY | os.ST_NOSUID))
    with pytest.raises(InputError, match=r"(?s)Nothing can be written below .* can be read only"):
        check_disk(tmp_path / "out", 10)
