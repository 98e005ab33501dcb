"""Quantised checkpoints, by the names and types that each format stores, with and without a word in config.json."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cla_convert.conversion.convert import convert
from cla_convert.conversion.inspect import inspect_model
from cla_convert.conversion.plan import make_plan
from cla_convert.errors import InputError
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import load_model
from cla_convert.training.weights import Unfilled

from ..tiny import save_tiny

Stored = dict[str, torch.Tensor]
Format = Callable[[str, torch.Tensor], Stored]
EIGHT = torch.float8_e4m3fn


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


PACKED: dict[str, Format] = {
    "awq": lambda m, w: {
        f"{m}.qweight": zeros(w.shape[1], len(w) // 8), f"{m}.qzeros": zeros(1, len(w) // 8),
        f"{m}.scales": torch.ones(1, len(w)),
    },
    "gptq": lambda m, w: {
        f"{m}.qweight": zeros(w.shape[1] // 8, len(w)), f"{m}.qzeros": zeros(1, len(w) // 8),
        f"{m}.scales": torch.ones(1, len(w)), f"{m}.g_idx": zeros(w.shape[1]),
    },
    "compressed-tensors": lambda m, w: {
        f"{m}.weight_packed": zeros(len(w), w.shape[1] // 8), f"{m}.weight_scale": torch.ones(len(w), 1),
        f"{m}.weight_shape": torch.tensor(w.shape),
    },
    "fp8": lambda m, w: {f"{m}.weight": w.to(EIGHT), f"{m}.weight_scale_inv": torch.ones(1, 1)},
    "modelopt": lambda m, w: {
        f"{m}.weight": zeros(len(w), w.shape[1] // 2, dtype=torch.uint8), f"{m}.input_scale": torch.tensor(1.0),
        f"{m}.weight_scale": torch.ones(len(w), 2).to(EIGHT), f"{m}.weight_scale_2": torch.tensor(1.0),
    },
    "bitsandbytes": lambda m, w: {
        f"{m}.weight": zeros(w.numel() // 2, 1, dtype=torch.uint8), f"{m}.weight.absmax": zeros(8, dtype=torch.uint8),
        f"{m}.weight.quant_map": torch.zeros(16),
    },
    "bitsandbytes-8": lambda m, w: {f"{m}.weight": w.to(torch.int8), f"{m}.SCB": torch.ones(len(w))},
    "torchao": lambda m, w: {f"{m}.weight:_data": w.to(torch.int8), f"{m}.weight:_scale": torch.ones(len(w))},
    "bitnet": lambda m, w: {f"{m}.weight": zeros(len(w) // 4, w.shape[1], dtype=torch.uint8)},
}  # fmt: skip
SCALED: dict[str, Format] = {
    "blocks": lambda m, w: {f"{m}.weight": w, f"{m}.weight_scale_inv": torch.full((1, 1), 3.0)},
    "rows": lambda m, w: {f"{m}.weight": w, f"{m}.weight_scale": torch.ones(len(w), 1)},
    "of the module": lambda m, w: {f"{m}.weight": w, f"{m}.scales": torch.ones(1, len(w))},
    "of a whole": lambda m, w: {f"{m}.weight": w, f"{m}.weight_global_scale": torch.tensor(2.0)},
}
BESIDE: Format = lambda m, w: {f"{m}.weight": w, f"{m}.input_scale": torch.tensor(3.0), f"{m}.k_scale": torch.ones(())}  # noqa: E731


def stored(case: str, folder: Path, form: Format, said: str = "") -> Path:
    """A tiny model whose projections are stored so, and what config.json says of it."""
    save_tiny(case, folder)
    found: Stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        found |= form(name.removesuffix(".weight"), weight) if name.endswith("_proj.weight") else {name: weight}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    if said:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": said}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusal(folder: Path) -> InputError:
    found = inspect_model(str(folder))
    assert found["supported"] is False and found["patterns"] == {}
    with pytest.raises(InputError) as caught:
        make_plan(Checkpoint.open(folder), sharing="cla2", init="mean")
    assert found["reason"].startswith(caught.value.what)
    return caught.value


@pytest.mark.parametrize("case", ["llama", "phi3"])
@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("form", PACKED)
def test_packed_weights(form, said, case, tmp_path):
    error = refusal(stored(case, tmp_path, PACKED[form], form if said else ""))
    assert error.what == "The model's weights are quantised" and "unquantised checkpoint" in error.fix
    assert "model.layers.0.mlp.down_proj." in error.why and (f"({form})" in error.why) is said


def test_a_word_of_it_and_ordinary_weights(tmp_path):
    error = refusal(stored("llama", tmp_path, lambda m, w: {f"{m}.weight": w}, "fp8"))
    assert "(fp8)" in error.why and "take quantization_config out" in error.fix


@pytest.mark.parametrize("case", ["llama", "phi3"])
@pytest.mark.parametrize("form", SCALED)
def test_scales_beside_ordinary_weights_are_no_leftovers(form, case, tmp_path):
    """transformers would load the weights without them: a model that answers something else."""
    folder = stored(case, tmp_path, SCALED[form])
    scale = "model.layers.0.mlp.down_proj.weight is to be multiplied, and "
    assert scale in refusal(folder).what
    for load in (load_model, lambda folder: Unfilled(folder, dtype=torch.float32, device="cpu")):
        with pytest.raises(InputError, match="The model's weights are quantised: .*down_proj"):
            load(folder)


@pytest.mark.parametrize("case", ["mixtral", "phimoe"])
def test_scales_of_experts_which_have_other_names_when_loaded(case, tmp_path):
    """transformers stacks what is stored as w1, w2, w3 of each expert, and tells of what is left under new names."""
    folder = save_tiny(case, tmp_path)
    weights = load_file(folder / "model.safetensors")
    scaled = {name: weight for name, weight in weights.items() if name.endswith(".w2.weight")}
    scales = {f"{name}_scale": torch.tensor(3.0) for name in scaled}
    save_file(weights | {name: weight / 3 for name, weight in scaled.items()} | scales,
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    assert "experts.0.w2.weight is to be multiplied" in refusal(folder).what
    for load in (load_model, lambda folder: Unfilled(folder, dtype=torch.float32, device="cpu")):
        with pytest.raises(InputError, match="The model's weights are quantised: .*w2"):
            load(folder)


@pytest.mark.parametrize("case", ["llama", "phi3"])
def test_scales_of_activations_and_of_the_cache_are_left_out(case, tmp_path):
    folder = stored(case, tmp_path / "m", BESIDE)
    source = Checkpoint.open(folder)
    plan = make_plan(source, sharing="cla2", init="mean")
    assert any("input_scale" in left and "dropped" in left for left in plan.left_out)
    convert(plan, source, tmp_path / "out")
    assert not [name for name in Checkpoint.open(tmp_path / "out").tensors if "scale" in name]
    for loadable in (tmp_path / "out", folder):
        load_model(loadable)
