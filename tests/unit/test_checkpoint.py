"""Reading checkpoints lazily, refusing broken ones by name; writing whole folders or none."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cla_convert.conversion.convert import convert
from cla_convert.conversion.plan import make_plan
from cla_convert.errors import InputError
from cla_convert.models.checkpoint import INDEX, Checkpoint
from cla_convert.models.families import family_of
from cla_convert.models.fingerprint import fingerprint
from cla_convert.models.headers import TORCH_NAMES, read_header
from cla_convert.models.shape import shape_of
from cla_convert.models.source import resolve_source
from cla_convert.models.writer import MANIFEST, ShardWriter, check_disk, infos_of, publishing
from tests.conftest import save_tiny_llama


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_headers_agree_with_the_tensors(tiny_llama):
    checkpoint = Checkpoint.open(tiny_llama)
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        assert tuple(tensor.shape) == info.shape
        assert tensor.numel() * tensor.element_size() == info.nbytes


def test_sharded_equals_single(tmp_path, tiny_llama):
    sharded = Checkpoint.open(save_tiny_llama(tmp_path / "sharded", max_shard_size="20KB"))
    assert len({info.file for info in sharded.tensors.values()}) > 3
    single = Checkpoint.open(tiny_llama)
    assert sharded.tensors.keys() == single.tensors.keys()
    assert all(torch.equal(sharded.read(name), single.read(name)) for name in single.tensors)


def test_truncated_file_is_refused(tmp_path, tiny_llama):
    broken = copy_of(tiny_llama, tmp_path / "m")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        Checkpoint.open(broken)
    for content in (b"", b"\xff" * 8 + b"{}", (5).to_bytes(8, "little") + b"hello", b"\x02" + b"\0" * 7 + b"[]"):
        weights.write_bytes(content)
        with pytest.raises(InputError, match="not a whole safetensors file"):
            read_header(weights)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_index_that_reaches_outside_is_refused(tmp_path, tiny_llama, file):
    folder = copy_of(tiny_llama, tmp_path / "m")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(InputError, match="outside the folder"):
        Checkpoint.open(folder)


def test_index_that_promises_too_much_is_refused(tmp_path, tiny_llama):
    folder = copy_of(tiny_llama, tmp_path / "m")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"nothing.weight": "model.safetensors"}}))
    with pytest.raises(InputError, match="promises, such as 'nothing.weight'"):
        Checkpoint.open(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(InputError, match="is missing"):
        Checkpoint.open(folder)


def test_types_that_nobody_knows_are_refused(tmp_path):
    header = json.dumps({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"12")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="F4"):
        Checkpoint.open(tmp_path)


def test_missing_model_suggests_a_neighbour(tiny_llama):
    with pytest.raises(InputError, match="Did you mean 'llama'"):
        resolve_source(str(tiny_llama.with_name("lama")))


def test_no_network_is_said(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as caught:
        resolve_source("nobody/no-such-model")
    assert "There is no model 'nobody/no-such-model' on this machine" in str(caught.value)
    assert "HF_HUB_OFFLINE" in str(caught.value) and f"It is no folder in {Path.cwd()}" in caught.value.why


def test_pickled_weights_only_when_asked(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setenv("CLA_CONVERT_CACHE", str(tmp_path / "cache"))
    folder = copy_of(tiny_llama, tmp_path / "pickled")
    state = {name: Checkpoint.open(tiny_llama).read(name) for name in Checkpoint.open(tiny_llama).tensors}
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled"):
        resolve_source(str(folder))
    rewritten = Checkpoint.open(resolve_source(str(folder), allow_pickle=True))
    assert all(torch.equal(rewritten.read(name), tensor) for name, tensor in state.items())
    assert "tokenizer.json" in [file.name for file in rewritten.sidecars]

    torch.save({"w": Path}, folder / "pytorch_model.bin")  # a pickle that names a class is not weights
    os.utime(folder / "pytorch_model.bin", (1, 1))
    with pytest.raises(InputError, match="weights_only"):
        resolve_source(str(folder), allow_pickle=True)


def test_unsupported_architecture_is_named():
    with pytest.raises(InputError) as caught:
        family_of({"model_type": "falcon", "architectures": ["FalconForCausalLM"]})
    assert "FalconForCausalLM" in str(caught.value)
    assert "llama" in str(caught.value)
    with pytest.raises(InputError, match="already"):
        family_of({"model_type": "cla_llama"})
    with pytest.raises(InputError, match="num_hidden_layers"):
        shape_of({"model_type": "llama"})


def test_writer_shards_and_index(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    writer = ShardWriter(tmp_path, infos_of(tensors), max_shard_size=85)
    for name in reversed(tensors):  # in any order
        writer.add(name, tensors[name])
    writer.finish()
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 5 * 40
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("in_the_kernel", [True, False])
def test_what_is_written_is_what_safetensors_reads(tmp_path, monkeypatch, in_the_kernel):
    """Every dtype, odd sizes in between, no elements, no dimensions, not contiguous; added, and copied from there."""
    kinds = [getattr(torch, name) for name in TORCH_NAMES.values()]
    tensors = {f"{kind}": (torch.arange(3) + i).to(kind) for i, kind in enumerate(kinds)}
    tensors |= {"empty": torch.empty(0, 4), "number": torch.tensor(3.5), "turned": torch.arange(6.0).view(2, 3).T}
    for folder in ("added", "copied"):
        (tmp_path / folder).mkdir()
    writer = ShardWriter(tmp_path / "added", infos_of(tensors), max_shard_size=10_000)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    (tmp_path / "added" / "config.json").write_text("{}")
    added = Checkpoint.open(tmp_path / "added")
    if not in_the_kernel:
        monkeypatch.delattr("os.copy_file_range", raising=False)
    writer = ShardWriter(tmp_path / "copied", dict(reversed(added.tensors.items())), max_shard_size=10_000)
    for name, info in added.tensors.items():
        writer.copy(name, added.folder / info.file, info.start)
    writer.finish()
    for folder in ("added", "copied"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())
    assert all(torch.equal(added.read(name), tensor) for name, tensor in tensors.items())


def test_a_forgotten_tensor_is_noticed(tmp_path):
    writer = ShardWriter(tmp_path, infos_of({"a": torch.zeros(2), "b": torch.zeros(2)}), max_shard_size=100)
    writer.add("a", torch.zeros(2))
    with pytest.raises(AssertionError, match="such as b"):
        writer.finish()
    with pytest.raises(AssertionError, match="was announced"):
        writer.add("b", torch.zeros(3))


def test_a_header_whose_offsets_do_not_fit_the_shapes_is_refused(tmp_path):
    header = b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(InputError, match="bytes that its shape needs"):
        read_header(tmp_path / "x.safetensors")


def test_publishing_is_all_or_nothing(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), publishing(out) as staging:
        (staging / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []

    with publishing(out) as staging:
        (staging / MANIFEST).write_text("{}")
    with pytest.raises(InputError, match="not empty"), publishing(out):
        pass
    with pytest.raises(RuntimeError), publishing(out, overwrite=True) as staging:
        raise RuntimeError
    assert (out / MANIFEST).exists()  # a failed overwrite loses nothing
    with publishing(out, overwrite=True) as staging:
        (staging / "new").write_text("x")
        (staging / MANIFEST).write_text("{}")
    assert sorted(file.name for file in out.iterdir()) == [MANIFEST, "new"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(InputError, match="not written by cla-convert"), publishing(tmp_path, overwrite=True):
        pass
    assert (tmp_path / "precious.txt").exists()


def test_what_others_put_into_an_output_is_not_replaced_with_it(tmp_path, tiny_llama):
    """The source of the next conversion, a corpus, a repository."""
    out = tmp_path / "out"
    with publishing(out) as staging:
        (staging / MANIFEST).write_text("{}")
        (staging / "additional_chat_templates").mkdir()
    source = copy_of(tiny_llama, out / "source")
    checkpoint = Checkpoint.open(source)
    plan = make_plan(checkpoint, sharing="cla2", init="mean")
    with pytest.raises(InputError, match=re.escape(f"{source} lies in it")):
        convert(plan, checkpoint, out, overwrite=True)
    assert (source / "model.safetensors").exists()
    convert(plan, checkpoint, source / "cla2")  # the other way round nothing is in the way
    assert fingerprint(source) == fingerprint(tiny_llama)
    shutil.rmtree(source)
    with publishing(out, overwrite=True) as staging:
        (staging / MANIFEST).write_text("{}")


def test_a_link_to_an_output_stays_one(tmp_path):
    disk, link = tmp_path / "disk", tmp_path / "link"
    link.symlink_to(disk)
    for content in ("1", "2"):
        with publishing(link, overwrite=True) as staging:
            (staging / MANIFEST).write_text(content)
    assert link.is_symlink() and (disk / MANIFEST).read_text() == "2"
    assert sorted(tmp_path.iterdir()) == [disk, link]


def test_staging_of_a_killed_process_is_cleaned_up(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from cla_convert.models.writer import publishing\n"
        f"with publishing(Path({str(tmp_path / 'out')!r})) as staging:\n"
        "    (staging / 'half').write_text('x'); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert [file.name.partition("-")[0] for file in sorted(tmp_path.iterdir())] == [".out.lock", ".out.partial"]
    with publishing(tmp_path / "out") as staging:
        (staging / "whole").write_text("x")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_small_disk_is_said_before_work(tmp_path):
    with pytest.raises(InputError, match="too small"):
        check_disk(tmp_path / "not" / "there" / "yet", 10**18)
