"""The walk over the layers on tiny random models: exact where it must be, better than doing nothing where it may."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from cla_convert.console import progress
from cla_convert.conversion import blocks, reconstruction
from cla_convert.conversion.blocks import Factory
from cla_convert.conversion.calibration import calibrated_pooling
from cla_convert.conversion.factories import Factories
from cla_convert.conversion.initialisation import INITIALISATIONS, CalibrationText, LayerPatch
from cla_convert.conversion.pieces import Pieces
from cla_convert.conversion.reconstruction import orthogonalise
from cla_convert.conversion.sharing import sharing_map
from cla_convert.conversion.source_streams import SourceStreams
from cla_convert.conversion.streams import Part, Store, places_for
from cla_convert.effort import Effort
from cla_convert.errors import InputError
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import load_model
from cla_convert.models.families import family_of
from cla_convert.models.shape import shape_of
from tests.tiny import CASES, cla_model, source_model

LLAMAS = [case for case, (family, _) in CASES.items() if family == "llama"]
CLOSED = Effort(0, 64)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[PreTrainedModel], Checkpoint]:
    """Saves a model and opens it as conversion does."""

    def save(model: PreTrainedModel) -> Checkpoint:
        model.save_pretrained(tmp_path / "source")
        return Checkpoint.open(tmp_path / "source")

    return save


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 258, (16, 32), generator=torch.Generator().manual_seed(1))


def patches_of(source: Checkpoint, sources: list[int], tokens: Tensor, **settings) -> list[LayerPatch]:
    settings = {"effort": CLOSED, "dtype": torch.float32} | settings
    return list(calibrated_pooling(source, source.config, sources, tokens, **settings))


def converted(case: str, source: Checkpoint, sources: list[int], patches: list[LayerPatch]) -> PreTrainedModel:
    """The model that the patches describe; fails if they name a tensor that it lacks."""
    student = cla_model(case, sources)
    state = load_model(source.folder).state_dict() | {name: source.read(name) for name in source.tensors}
    for patch in patches:
        assert patch.tensors.keys() <= student.state_dict().keys()
        state |= patch.tensors
    state = {name: tensor for name, tensor in state.items() if name in student.state_dict()}
    missing, _ = student.load_state_dict(state, strict=False)
    assert not [name for name in missing if name != "lm_head.weight"]
    student.tie_weights()
    return student


def logits(model: Callable, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def plant(model: PreTrainedModel, member: int, owner: int) -> None:
    """Let layers owner..member-1 add nothing, and make `member` the owner in other bases: both see the same input."""
    config, layers = model.config, model.model.layers
    family = family_of(config.to_dict())
    for layer in layers[owner:member]:
        layer.self_attn.o_proj.weight.data.zero_()
        for name, parameter in layer.mlp.named_parameters():
            if "down_proj" in name:
                torch.nn.init.zeros_(parameter)
        if layer.self_attn.o_proj.bias is not None:
            layer.self_attn.o_proj.bias.data.zero_()
    if before := family.norms.before_attention:
        layers[member].get_submodule(before).load_state_dict(layers[owner].get_submodule(before).state_dict())
    dim, half = config.head_dim, config.head_dim // 2
    order = list(range(config.num_key_value_heads))[::-1]
    channels = torch.arange(dim)
    if family.adjacent_pairs:
        channels = channels.view(-1, 2).T.flatten()
    normed = family.qk_norm
    for name in family.qk_norm_names if normed else ():
        for index in (owner, member):
            gain = layers[index].self_attn.get_submodule(name).weight.data
            gain[half:] = gain[:half]
    if normed:
        norms = [layers[index].self_attn.get_submodule(family.norm_name("k")) for index in (owner, member)]
        norms[1].load_state_dict(norms[0].state_dict())
    for name in ("weight", "bias") if layers[owner].self_attn.q_proj.bias is not None else ("weight",):
        get = lambda index, projection: getattr(getattr(layers[index].self_attn, projection), name).data  # noqa: E731, B023
        for slot, head in enumerate(order):
            generator = torch.Generator().manual_seed(slot)
            scale = torch.randn(half, dtype=torch.complex64, generator=generator)
            scale = scale / scale.abs() if normed else scale  # a norm undoes what is no rotation
            new, old = slice(slot * dim, (slot + 1) * dim), slice(head * dim, (head + 1) * dim)
            rows = get(owner, "k_proj")[old].view(dim, -1)[channels]
            turned = torch.complex(rows[:half], rows[half:]) * scale[:, None]
            turned = torch.cat([turned.real, turned.imag])[channels.argsort()]
            get(member, "k_proj")[new] = turned.view_as(get(member, "k_proj")[new])
            get(member, "v_proj")[new] = torch.randn(dim, dim, generator=generator) @ get(owner, "v_proj")[old]


@pytest.mark.parametrize(
    "case", [*LLAMAS, "qwen3", "hunyuan", "ernie4_5-biases", "cohere2", "mixtral", "qwen3_moe", "gpt_oss"]
)
def test_a_planted_change_of_basis_is_recovered(case: str, tokens: Tensor, saved) -> None:
    """Whatever pairs of channels RoPE turns; sinks go with their query heads."""
    model, sources = source_model(case), [0, 1, 2, 3, 4, 5]
    kinds = shape_of(model.config.to_dict()).kinds
    member = kinds.index(kinds[1], 2)
    sources[member] = 1
    plant(model, member=member, owner=1)
    source = saved(model)
    patches = patches_of(source, sources, tokens)
    fit = patches[1].fit
    assert fit and fit.captured_k == pytest.approx(1, abs=1e-5) and fit.captured_v == pytest.approx(1, abs=1e-5)
    assert fit.mismatch < 1e-8 and (fit.temperature_error or 0) < 1e-5
    torch.testing.assert_close(
        logits(converted(case, source, sources, patches), tokens), logits(model, tokens), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_layers_one_by_one_are_the_model(case: str, devices: int, tokens: Tensor, saved) -> None:
    model = source_model(case)
    source = saved(model)
    factory = Factory(source, source.config, tokens, "cpu", torch.float32)
    factories, last = Factories(factory, ["cpu"] * devices), model.config.num_hidden_layers
    teacher = SourceStreams(factories, tokens, Store(factories.devices))
    with torch.no_grad():
        teacher.upto(last - 1)
        ends = teacher.inputs[last].rows(torch.arange(len(tokens)), factory.device)
        found = factory.skeleton.head(torch.float32)(ends).log_softmax(-1)
    torch.testing.assert_close(found, logits(model, tokens).log_softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_experts_are_stacked_in_their_order(case: str, saved) -> None:
    """Twelve of them: as text, 10 comes before 2."""
    model = source_model(case, num_experts=12, num_local_experts=12)
    source, pieces = saved(model), Pieces(family_of(model.config.to_dict()).cla_type)
    found = pieces.assemble({name: source.read(name) for name in source.tensors})
    assert found.keys() == model.state_dict().keys() and len(found) < len(source.tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert {pieces.whole(name) for name in source.tensors} == found.keys()


def test_without_sharing_nothing_changes(tokens: Tensor, saved) -> None:
    patches = patches_of(saved(source_model("llama")), [0, 1, 2, 3, 4, 5], tokens)
    assert [patch.tensors for patch in patches] == [{}] * 6


def divergence(model: PreTrainedModel, other: PreTrainedModel, tokens: Tensor) -> float:
    wanted, found = (logits(m, tokens).log_softmax(-1) for m in (model, other))
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()


@pytest.mark.parametrize("sources", [[0, 0, 0, 3, 3, 3], [0, 1, 0, 1, 4, 1]])
@pytest.mark.parametrize("case", LLAMAS)
def test_any_map_is_calibrated(case: str, sources: list[int], tokens: Tensor, saved) -> None:
    model = source_model(case)
    source = saved(model)
    before, after = (converted(case, source, sources, p) for p in ([], patches_of(source, sources, tokens)))
    assert divergence(model, after, tokens) < 0.8 * divergence(model, before, tokens)


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "olmo2"])
def test_the_refit_leaves_alone_what_a_norm_silences(case: str, tokens: Tensor, saved) -> None:
    """A silent channel that grew would take from all others, because the norm divides by all of them."""
    model, silent = source_model(case), 3
    for layer in model.model.layers:
        gain = layer.post_attention_layernorm.weight.data
        gain[silent] = 1e-3 - (1 if "gemma" in case else 0)
    source = saved(model)
    sources = sharing_map("cla2-keep-ends", shape_of(source.config).kinds)
    patch = patches_of(source, sources, tokens)[-1]  # of the last layer, which owns its K/V: only the refit changes it
    ((name, new),) = ((name, t) for name, t in patch.tensors.items() if name.endswith("o_proj.weight"))
    change = (new - source.read(name)).norm(dim=1) / source.read(name).norm(dim=1)
    assert change[silent] < 0.01 * change.median()


@pytest.mark.parametrize("case", CASES)
def test_calibration_beats_the_owners_own_projections(case: str, tokens: Tensor, saved) -> None:
    model = source_model(case)
    source = saved(model)
    sources = sharing_map("cla2-keep-ends", shape_of(source.config).kinds)
    patches = patches_of(source, sources, tokens)
    before, after = (converted(case, source, sources, p) for p in ([], patches))
    assert divergence(model, after, tokens) < 0.8 * divergence(model, before, tokens)
    norms = [patch.fit.temperature_error is not None for patch in patches if patch.fit]
    assert norms == [family_of(source.config).qk_norm] * len(norms)


def test_patches_name_what_each_kind_of_layer_has(tokens: Tensor, saved) -> None:
    patches = patches_of(saved(source_model("llama")), [0, 1, 1, 3, 4, 4], tokens)
    names = [sorted(name.split(".")[4] for name in patch.tensors) for patch in patches]
    everything = ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert names == [[], everything, ["o_proj", "q_proj"], everything, everything, ["o_proj", "q_proj"]]
    assert [patch.fit.layers if patch.fit else None for patch in patches] == [None, (1, 2), None, None, (4, 5), None]
    assert all(t.dtype == torch.float32 for patch in patches for t in patch.tensors.values())


@pytest.mark.parametrize("case", ["llama", "qwen3", "llama-biases", "qwen3_5"])
@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", ""])
def test_a_projection_or_layer_of_zeros_is_pooled(case: str, part: str, tokens: Tensor, saved) -> None:
    """Of heads that were pruned, or of a layer that was put in to be trained."""
    model = source_model(case)
    sources = sharing_map("cla2", shape_of(model.config.to_dict()).kinds)
    owner = next(layer for layer, of in enumerate(sources) if of == layer and sources.count(layer) > 1)
    for parameter in model.model.layers[owner].get_submodule(part).parameters():
        parameter.data.zero_()
    source = saved(model)
    patches = patches_of(source, sources, tokens, effort=Effort(steps=2, tokens_per_step=64))
    assert all(tensor.isfinite().all() for patch in patches for tensor in patch.tensors.values())
    found = [share for p in patches if p.fit for share in (p.fit.captured_k, p.fit.captured_v)]
    assert found and all(-1e-6 < share < 1 + 1e-6 for share in found)
    assert divergence(converted(case, source, sources, patches), model, tokens) < 1


def test_matching_lowers_the_damage(tokens: Tensor, saved) -> None:
    source, sources = saved(source_model("llama")), [0, 1, 1, 3, 3, 5]
    before, after = (
        [patch.fit.mismatch for patch in patches_of(source, sources, tokens, effort=Effort(steps, 128)) if patch.fit]
        for steps in (0, 20)
    )
    assert all(b < 0.8 * a for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("case", ["qwen3", "gemma3", "olmo2"])
def test_matching_moves_gains_in_proportion(case: str, tokens: Tensor, saved) -> None:
    """A step that suits a gain of 1 would make a gain of 0.01 another one, of another sign."""
    model, small = source_model(case), 2
    for layer in model.model.layers:
        layer.self_attn.k_norm.weight.data[small] = 0.01 - (1 if "gemma" in case else 0)
    source = saved(model)
    before, after = (
        [gain for patch in patches_of(source, sharing_map("cla2-keep-ends", shape_of(source.config).kinds), tokens,
                                      effort=Effort(steps, 512))
         for name, gain in patch.tensors.items() if name.endswith("k_norm.weight")]
        for steps in (0, 1)
    )  # fmt: skip
    offset = 1 if "gemma" in case else 0
    moved = [((b - a) / (a + offset)).abs().max() for a, b in zip(before, after, strict=True)]
    assert 0 < max(moved) < 0.2


def test_the_same_seed_gives_the_same_weights_wherever_streams_are_kept(
    tokens: Tensor, tmp_path: Path, saved, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, sources = saved(source_model("llama")), [0, 1, 1, 3, 3, 5]
    spill = tmp_path / "spill"
    spill.mkdir()
    settings = {"effort": Effort(3, 64), "spill": spill}
    first, again, other = (patches_of(source, sources, tokens, seed=seed, **settings) for seed in (1, 1, 2))
    assert "kept on the disk" not in capsys.readouterr().err
    monkeypatch.setattr("cla_convert.conversion.streams.available_memory", lambda: 0)
    spilled = patches_of(source, sources, tokens, seed=1, **settings)
    assert "kept on the disk" in capsys.readouterr().err
    for patch, *same in zip(first, again, spilled, strict=True):
        assert all(patch.tensors.keys() == one.tensors.keys() for one in same)
        assert all(torch.equal(tensor, one.tensors[name]) for name, tensor in patch.tensors.items() for one in same)
    name = "model.layers.3.self_attn.q_proj.weight"
    assert not torch.equal(first[3].tensors[name], other[3].tensors[name])
    assert not list(spill.iterdir())


def test_a_spilled_stream_takes_disk_at_once_and_gives_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, part = Store([torch.device("cpu")] * 2, tmp_path).empty(5, 8, 16), Part(1, slice(0, 1))
    stream[part] = torch.full((1, 8, 16), 5.0)
    assert stream.shape == (5, 8, 16) and stream[part].eq(5).all() and list(map(len, stream.shares)) == [3, 2]
    assert not list(tmp_path.iterdir())  # its name is gone already: nothing is left even by a process that is killed

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(InputError, match="is full"):
        Store([torch.device("cpu")], tmp_path).empty(4, 8, 16)
    assert not list(tmp_path.iterdir())


def test_half_of_the_memory_is_for_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cla_convert.conversion.streams.available_memory", lambda: 1000)
    cpu = [torch.device("cpu")]
    assert places_for(cpu, 500) == cpu and places_for(cpu, 501) is None


def test_a_bar_of_matching_steps_ends_with_the_last_of_them_and_names_the_groups(tokens: Tensor, saved) -> None:
    source, sources = saved(source_model("llama")), [0, 1, 1, 3, 3, 5]
    text, init = CalibrationText(tokens, "", steps=3), INITIALISATIONS.named("calibrated")
    steps, notes = init.steps(sources, text), []
    with progress(2 * steps, "matching", counts="matching", hidden=True) as bar:
        bar.note = notes.append
        list(init.patches(source, sources, 2, text, source.folder))
        assert bar.n == steps == 3 * 3  # the first layer is as it was
    assert {"layers 1-2: closed form", "layers 1-2", "layer 2: output", "layer 5"} <= set(notes)
    assert init.steps(list(range(6)), text) == 0 and INITIALISATIONS.named("mean").steps(sources, text) == 0


def test_bfloat16_products_stay_close(tokens: Tensor, saved) -> None:
    source, sources = saved(source_model("llama")), [0, 1, 1, 3, 3, 5]
    damage = [
        [p.fit.mismatch for p in patches_of(source, sources, tokens, dtype=dtype) if p.fit]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert damage[1] == pytest.approx(damage[0], rel=0.1)


def test_no_tokens_are_refused(saved) -> None:
    source = saved(source_model("llama"))
    with pytest.raises(InputError, match="needs tokens"):
        next(calibrated_pooling(source, source.config, [0, 0, 2, 2, 4, 4], torch.empty(0, 8, dtype=torch.int64)))


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 8, 20), (2, 20, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.3
    assert not orthogonalise(torch.zeros(1, 4, 4)).any()


class DtypesOfProducts(TorchDispatchMode):
    """What matrices are multiplied in."""

    def __init__(self) -> None:
        super().__init__()
        self.found = set[torch.dtype]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            self.found |= {arg.dtype for arg in args if isinstance(arg, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_not_emulated(saved, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """A processor without it takes many times as long as in float32."""
    monkeypatch.setattr(blocks, "has_native_bfloat16", lambda device: native)
    source = saved(source_model("llama"))
    with DtypesOfProducts() as products:
        patches_of(source, [0, 0, 2, 2, 4, 4], tokens, effort=Effort(2, 64), dtype=None)
    assert (torch.bfloat16 in products.found) == native and torch.float32 in products.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a recorded step needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_are_the_steps(case: str, tokens: Tensor, saved, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(source_model(case))
    sources = sharing_map("cla2-keep-ends", shape_of(source.config).kinds)
    found = []
    for least in (0, 100):
        monkeypatch.setattr(reconstruction, "_WORTH_RECORDING", least)
        found.append(patches_of(source, sources, tokens, effort=Effort(8, 64), device="cuda"))
    for replayed, plain in zip(*found, strict=True):
        torch.testing.assert_close(replayed.tensors, plain.tensors, rtol=1e-4, atol=1e-5)


def test_a_gpu_without_room_for_the_streams_is_told(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """What torch keeps of freed memory counts as free; what fits on no GPU goes to main memory, with a word."""
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (700, 2000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 200)
    assert Store.choose(gpus, 1200).places == gpus and not capsys.readouterr().err
    assert Store.choose(gpus, 1202).places == [torch.device("cpu")] * 2
    assert "kept in main memory" in capsys.readouterr().err
