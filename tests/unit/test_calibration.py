"""The walk over the layers on tiny random models: exact where it must be, better than doing nothing where it may."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from cla_convert.conversion.calibration import LayerPatch, calibrated_pooling
from cla_convert.conversion.matching import Effort, orthogonalise
from cla_convert.errors import InputError
from cla_convert.models.configuration_cla_llama import ClaLlamaConfig
from cla_convert.models.modeling_cla_llama import ClaLlamaForCausalLM
from tests.conftest import tiny_llama_config

SHAPES = {
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True},
    "odd": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48},
}
CLOSED = Effort(0, 64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Memory:
    """A checkpoint in memory."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.config = model.config.to_dict()
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def source_model(**shape) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(**shape)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 258, (16, 32), generator=torch.Generator().manual_seed(1))


def patches_of(model: LlamaForCausalLM, sources: list[int], tokens: Tensor, **settings) -> list[LayerPatch]:
    source = Memory(model)
    settings = {"effort": CLOSED, "dtype": torch.float32} | settings
    return list(calibrated_pooling(source, source.config, sources, tokens, **settings))


def converted(model: LlamaForCausalLM, sources: list[int], patches: list[LayerPatch]) -> ClaLlamaForCausalLM:
    """The model that the patches describe; fails if they name a tensor that it lacks."""
    settings = model.config.to_dict()
    settings.pop("model_type")
    student = ClaLlamaForCausalLM(ClaLlamaConfig(**settings, kv_source_layers=sources)).eval()
    state = model.state_dict()
    for patch in patches:
        assert patch.tensors.keys() <= student.state_dict().keys()
        state |= patch.tensors
    student.load_state_dict({name: state[name] for name in student.state_dict()})
    return student


def logits(model: Callable, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def plant(model: LlamaForCausalLM, member: int, owner: int) -> None:
    """Let layers owner..member-1 add nothing, and make `member` the owner in other bases: both see the same input."""
    config, layers = model.config, model.model.layers
    for layer in layers[owner:member]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
        if layer.self_attn.o_proj.bias is not None:
            layer.self_attn.o_proj.bias.data.zero_()
    dim, half = config.head_dim, config.head_dim // 2
    order = torch.randperm(config.num_key_value_heads).tolist()
    for name in ("weight", "bias") if config.attention_bias else ("weight",):
        get = lambda index, projection: getattr(getattr(layers[index].self_attn, projection), name).data  # noqa: E731, B023
        for slot, head in enumerate(order):
            generator = torch.Generator().manual_seed(slot)
            scale = torch.randn(half, dtype=torch.complex64, generator=generator)
            new, old = slice(slot * dim, (slot + 1) * dim), slice(head * dim, (head + 1) * dim)
            rows = get(owner, "k_proj")[old].view(dim, -1)
            turned = torch.complex(rows[:half], rows[half:]) * scale[:, None]
            get(member, "k_proj")[new] = torch.cat([turned.real, turned.imag]).view_as(get(member, "k_proj")[new])
            get(member, "v_proj")[new] = torch.randn(dim, dim, generator=generator) @ get(owner, "v_proj")[old]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_planted_change_of_basis_is_recovered(shape: str, tokens: Tensor) -> None:
    model, sources = source_model(**SHAPES[shape]), [0, 1, 1, 3, 4, 5]
    plant(model, member=2, owner=1)
    patches = patches_of(model, sources, tokens)
    fit = patches[1].fit
    assert fit and fit.captured_k == pytest.approx(1, abs=1e-5) and fit.captured_v == pytest.approx(1, abs=1e-5)
    assert fit.damage < 1e-8
    torch.testing.assert_close(
        logits(converted(model, sources, patches), tokens), logits(model, tokens), rtol=1e-4, atol=1e-4
    )


def test_without_sharing_nothing_changes(tokens: Tensor) -> None:
    patches = patches_of(source_model(), [0, 1, 2, 3, 4, 5], tokens)
    assert [patch.tensors for patch in patches] == [{}] * 6


@pytest.mark.parametrize("sources", [[0, 1, 1, 3, 3, 5], [0, 0, 0, 3, 3, 3], [0, 1, 0, 1, 4, 1]])
@pytest.mark.parametrize("shape", SHAPES)
def test_calibration_beats_the_owners_own_projections(shape: str, sources: list[int], tokens: Tensor) -> None:
    model = source_model(**SHAPES[shape])
    patches = patches_of(model, sources, tokens)
    wanted = logits(model, tokens).log_softmax(-1)
    divergence = [
        (wanted.exp() * (wanted - logits(converted(model, sources, p), tokens).log_softmax(-1))).sum(-1).mean()
        for p in ([], patches)
    ]
    assert divergence[1] < 0.8 * divergence[0]


def test_patches_name_what_each_kind_of_layer_has(tokens: Tensor) -> None:
    patches = patches_of(source_model(), [0, 1, 1, 3, 4, 4], tokens)
    names = [sorted(name.split(".")[4] for name in patch.tensors) for patch in patches]
    everything = ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert names == [[], everything, ["o_proj", "q_proj"], everything, everything, ["o_proj", "q_proj"]]
    assert [patch.fit.layers if patch.fit else None for patch in patches] == [None, (1, 2), None, None, (4, 5), None]
    assert all(t.dtype == torch.float32 for patch in patches for t in patch.tensors.values())


def test_matching_lowers_the_damage(tokens: Tensor) -> None:
    model, sources = source_model(), [0, 1, 1, 3, 3, 5]
    before, after = (
        [patch.fit.damage for patch in patches_of(model, sources, tokens, effort=Effort(steps, 128)) if patch.fit]
        for steps in (0, 20)
    )
    assert all(b < 0.8 * a for a, b in zip(before, after, strict=True))


def test_the_same_seed_gives_the_same_weights_wherever_streams_are_kept(tokens: Tensor, tmp_path: Path) -> None:
    model, sources = source_model(), [0, 1, 1, 3, 3, 5]
    settings = [{"seed": 1}, {"seed": 1, "spill": tmp_path}, {"seed": 2}]
    first, spilled, other = (patches_of(model, sources, tokens, effort=Effort(3, 64), **s) for s in settings)
    name = "model.layers.3.self_attn.q_proj.weight"
    assert torch.equal(first[3].tensors[name], spilled[3].tensors[name])
    assert not torch.equal(first[3].tensors[name], other[3].tensors[name])
    assert not list(tmp_path.iterdir())


def test_progress_is_reported_layer_by_layer(tokens: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    patches_of(source_model(), [0, 0, 2, 2, 4, 4], tokens, on_progress=lambda *done: seen.append(done))
    assert seen == [(i + 1, 6) for i in range(6)]


def test_bfloat16_products_stay_close(tokens: Tensor) -> None:
    model, sources = source_model(), [0, 1, 1, 3, 3, 5]
    damage = [
        [p.fit.damage for p in patches_of(model, sources, tokens, dtype=dtype) if p.fit]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert damage[1] == pytest.approx(damage[0], rel=0.1)


def test_no_tokens_are_refused() -> None:
    source = Memory(source_model())
    with pytest.raises(InputError, match="needs tokens"):
        next(calibrated_pooling(source, source.config, [0, 0, 2, 2, 4, 4], torch.empty(0, 8, dtype=torch.int64)))


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 8, 20), (2, 20, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.3
    assert not orthogonalise(torch.zeros(1, 4, 4)).any()
