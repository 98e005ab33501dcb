"""Models filled tensor by tensor hold what transformers loads, whatever the way their files have of storing it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cla_convert.conversion.sharing import sharing_map
from cla_convert.errors import InputError
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import empty_model, export_model, load_model
from cla_convert.models.scoring import hidden_states, output_head
from cla_convert.models.shape import shape_of
from cla_convert.models.stored import StoredTensors
from cla_convert.training.optimizer import freeze_all_but, parts_of
from cla_convert.training.precision import cast_frozen
from cla_convert.training.weights import Unfilled

from ..tiny import CASES, cla_model, source_model, tiny_config

MAP = [0, 0, 2, 2, 4, 4]
IDS = torch.arange(2, 34)[None]


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def filled(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    unfilled = Unfilled(folder, dtype=dtype, device="cpu")
    assert all(parameter.is_meta for parameter in unfilled.model.parameters())
    unfilled.fill()
    return unfilled.model


def assert_same(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Bits, dtypes, ties, buffers, and logits."""
    for mine, theirs in (
        (dict(model.named_parameters()), dict(expected.named_parameters())),
        (dict(model.named_buffers()), dict(expected.named_buffers())),
    ):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("converted", [False, True], ids=["source", "converted"])
@pytest.mark.parametrize("case", CASES)
def test_every_family(case: str, converted: bool, tmp_path: Path) -> None:
    sources = sharing_map("cla2", shape_of(tiny_config(case).to_dict()).kinds)
    folder = save(cla_model(case, sources) if converted else source_model(case), tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(filled(folder, dtype), load_model(folder, dtype=dtype))


@pytest.mark.parametrize("case", ["llama", "mixtral", "qwen3_moe", "phi3"])
def test_rows_are_those_of_the_whole_and_parts_make_it_again(case: str, tmp_path: Path) -> None:
    folder = save(source_model(case), tmp_path)
    stored = StoredTensors(Checkpoint.open(folder, as_stored=True), empty_model(folder))
    model, files = load_model(folder), load_file(folder / "model.safetensors")
    found = {}
    for name in stored.parts:
        whole = stored.read(name)
        assert torch.equal(whole, model.state_dict()[name])
        for rows in (slice(0, 1), slice(1, 3), slice(len(whole) - 1, len(whole)), slice(len(whole), len(whole))):
            assert torch.equal(stored.read(name, rows), whole[rows])
        found |= stored.split(name, whole)
    assert found.keys() == files.keys() and all(torch.equal(found[name], files[name]) for name in files)


class TestTies:
    @pytest.mark.parametrize("same", [True, False])
    def test_a_head_that_is_stored_beside_the_embedding_is_tied_if_it_is_the_same(
        self, same: bool, tmp_path: Path
    ) -> None:
        folder = save(source_model("llama"), tmp_path)
        tensors = load_file(folder / "model.safetensors")
        head = tensors["model.embed_tokens.weight"].clone()
        head[0, 0] += 0 if same else 1
        save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
        model = filled(folder)
        tied = model.get_input_embeddings().weight is output_head(model).weight
        assert tied == same
        assert_same(model, load_model(folder, dtype=torch.float32))

    def test_the_head_alone_may_be_stored(self, tmp_path: Path) -> None:
        folder = save(source_model("llama"), tmp_path)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        assert_same(filled(folder), load_model(folder, dtype=torch.float32))


def test_a_checkpoint_without_the_prefix_of_its_names(tmp_path: Path) -> None:
    folder = save(source_model("qwen2"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    assert_same(filled(folder), load_model(folder, dtype=torch.float32))


def test_what_is_missing_or_of_another_shape_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    folder = save(source_model("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    lacking = {name: tensor for name, tensor in tensors.items() if "layers.2.mlp" not in name}
    save_file(lacking, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lacks weights"):
        filled(folder)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(65, 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight has the shape \(65, 32\)"):
        filled(folder)


def test_what_the_model_does_not_use_is_published_as_it_is(tmp_path: Path) -> None:
    folder = save(source_model("llama"), tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(3.0), "model.mtp": torch.ones(2, 2)}
    save_file({**tensors, **extra}, folder / "model.safetensors", {"format": "pt"})
    state = {name: tensor + 1 for name, tensor in load_model(folder).state_dict().items()}
    export_model(state, folder, tmp_path / "out")
    published = load_file(tmp_path / "out/model.safetensors")
    assert published.keys() == tensors.keys() | extra.keys()
    assert all(torch.equal(published[name], tensor + 1) for name, tensor in tensors.items())
    assert all(torch.equal(published[name], tensor) for name, tensor in extra.items())


class TestOneCopy:
    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        """A converted model and its source, one of whose MLPs is another."""
        student = cla_model("llama", MAP)
        teacher = source_model("llama")
        teacher.load_state_dict(student.state_dict(), strict=False)
        with torch.no_grad():
            teacher.model.layers[2].mlp.up_proj.weight[0, 0] += 1
        return save(student, tmp_path / "student"), save(teacher, tmp_path / "teacher")

    @pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
    def test_frozen_weights_are_shared_where_they_are_the_same_bits(
        self, folders: tuple[Path, Path], compute: torch.dtype
    ) -> None:
        student, teacher = (
            Unfilled(folder, dtype=dtype, device="cpu")
            for folder, dtype in zip(folders, (torch.float32, compute), strict=True)
        )
        freeze_all_but(student.model, "attention")
        cast_frozen(student.model, compute)
        teacher.fill()
        shared = student.adopt(teacher.model)
        student.fill()
        theirs = dict(teacher.model.named_parameters())
        one = {n for n, p in student.model.named_parameters() if n in theirs and p.data_ptr() == theirs[n].data_ptr()}
        other = {n for n, _, part in parts_of(student.model) if part == "other"}
        assert one == shared.keys() == other - {"model.layers.2.mlp.up_proj.weight"}
        expected = load_model(folders[1], dtype=compute)
        assert torch.equal(hidden_states(teacher.model, IDS), hidden_states(expected, IDS))
        for name, parameter in load_model(folders[0], dtype=torch.float32).named_parameters():
            mine = student.model.get_parameter(name)
            assert torch.equal(mine, parameter.to(compute if name in other else torch.float32))

    def test_another_dtype_is_not_shared(self, folders: tuple[Path, Path]) -> None:
        student = Unfilled(folders[0], dtype=torch.float32, device="cpu")
        freeze_all_but(student.model, "attention")
        assert not student.adopt(load_model(folders[1], dtype=torch.bfloat16))


def test_a_quantised_model_is_left_to_transformers(tmp_path: Path) -> None:
    folder = save(source_model("llama"), tmp_path)
    expected = load_model(folder, dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "unheard-of"}}))
    unfilled = Unfilled(folder, dtype=torch.float32, device="cpu")
    assert unfilled.quantised
    unfilled.fill()
    assert_same(unfilled.model, expected)
