"""Properties of the CLA modelling code that must hold exactly, on tiny random models."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments, cache_utils

from cla_convert.conversion.convert import convert
from cla_convert.conversion.plan import make_plan
from cla_convert.conversion.sharing import groups_of, sharing_map
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.classes import cla_classes, register
from cla_convert.models.export import load_model
from cla_convert.models.families import FAMILIES
from cla_convert.models.kinds import has_kv
from cla_convert.models.shape import owners_of, shape_of, unshared
from cla_convert.models.states import gated_delta
from cla_convert.models.verify import planned_bytes
from cla_convert.recipe import Train
from cla_convert.training.objective import Objective
from tests.conftest import byte_tokenizer
from tests.tiny import CASES, cla_model, save_tiny, source_model, tiny_config

MIXTURES = [case for case, (family, _) in CASES.items() if FAMILIES[family].code.experts]
MAPS = {"cla2-keep-ends": [0, 1, 1, 3, 3, 5], "cla3": [0, 0, 0, 3, 3, 3], "interleaved": [0, 1, 0, 1, 4, 1]}


def share(case: str, pattern: str) -> list[int | None]:
    """A named pattern on the layers of a case, whatever their kinds."""
    return sharing_map(pattern, shape_of(tiny_config(case).to_dict()).kinds)


def rounding(case: str) -> float:
    """Of a logit. Linear attention is float32 whatever the model is, and its two forms sum in two orders: 3e-4 in the
    source models of these cases, too."""
    return 1e-3 if FAMILIES[CASES[case][0]].state is gated_delta else 1e-5


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(1))


def test_every_family_is_tested():
    assert {family for family, _ in CASES.values()} == FAMILIES.keys()


@pytest.mark.parametrize("case", CASES)
def test_identity_map_is_the_source_model_exactly(case, ids, tmp_path):
    """Through reading, converting, writing and loading; only a fused projection sums in another order."""
    source = Checkpoint.open(save_tiny(case, tmp_path / "source"))
    convert(make_plan(source, sharing="cla1", init="mean"), source, tmp_path / "identity")
    fused = FAMILIES[CASES[case][0]].fused
    dtype, tolerance = (torch.float64, 1e-6) if fused else (torch.float32, 0)
    model, expected = (load_model(tmp_path / name, dtype=dtype) for name in ("identity", "source"))
    assert type(model).__name__ == FAMILIES[CASES[case][0]].class_name("ForCausalLM")
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_sharing_between_equal_layers_changes_nothing(case, ids, tmp_path):
    """A consumer computes what its layer did: same queries, mask, window, rotation and scale, in each kind of layer.

    Where owner and consumer have equal K/V projections and see the same input (what lies between them adds nothing to
    the residual stream), the source and the converted model are the same function.
    """
    family, kinds = FAMILIES[CASES[case][0]], shape_of(tiny_config(case).to_dict()).kinds
    first_pairs = {kinds[group[0]]: group[:2] for group in reversed(groups_of(share(case, "cla2"))) if len(group) > 1}
    assert first_pairs.keys() == set(filter(has_kv, kinds))
    model, sources = source_model(case), unshared(kinds)
    for owner, consumer in first_pairs.values():
        sources[consumer] = owner
        equalise(model.get_submodule(family.layers), family, owner, consumer)
    model.save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    convert(make_plan(source, sharing=sources, init="first"), source, tmp_path / "shared")
    with torch.inference_mode():
        expected = load_model(tmp_path / "source")(ids).logits
        torch.testing.assert_close(load_model(tmp_path / "shared")(ids).logits, expected, rtol=1e-5, atol=1e-5)


def equalise(layers, family, owner: int, consumer: int) -> None:
    """Silence the layers from the owner on, and give the consumer the owner's K/V projections and norm before them."""
    output = f"{family.attention}.{family.o_proj}"
    queries = layers[owner].get_submodule(output).in_features
    theirs = dict(layers[consumer].named_parameters())
    for name, parameter in layers[owner].named_parameters():
        if set(name.split(".")) & {*family.kv_modules, family.norms.before_attention}:
            theirs[name].data.copy_(parameter)
        elif family.fused and f".{family.fused}." in name:
            theirs[name].data[queries:] = parameter.data[queries:]
    for layer in layers[owner:consumer]:
        for name, parameter in layer.named_parameters():
            if name.startswith((f"{family.mlp}.", f"{output}.")) or name.endswith(".out_proj.weight"):  # of a state
                torch.nn.init.zeros_(parameter)


@pytest.mark.parametrize("case", CASES)
def test_cached_uncached_stepwise_and_static_agree(case, ids):
    model = cla_model(case, share(case, "cla3")).double()
    generation = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    with torch.inference_mode():
        full = model(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, use_cache=True).logits, full, rtol=0, atol=0)
        cache, steps = None, []
        for i in range(ids.shape[1]):
            out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-5, atol=rounding(case))  # norms are float32
        dynamic = model.generate(ids, **generation)
        static = model.generate(ids, **generation, cache_implementation="static", disable_compile=True)
    assert torch.equal(dynamic, static)


@pytest.mark.parametrize("case", CASES)
def test_generate_is_greedy_token_by_token(case, ids):
    model = cla_model(case, share(case, "cla2-keep-ends"))
    with torch.inference_mode():
        tokens = ids
        for _ in range(8):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    assert torch.equal(generated, tokens)


@pytest.mark.parametrize("case", ["llama", "gemma3", "smollm3", "gpt_bigcode"])
def test_beams_and_lookahead_decoding_use_the_small_cache_rightly(case, ids):
    """They reorder and crop the cache, where consumers have nothing to reorder or crop."""
    model = cla_model(case, share(case, "cla2-keep-ends"))
    settings = dict(attention_mask=torch.ones_like(ids[:1]), max_new_tokens=8, do_sample=False, eos_token_id=None)

    def generate(**more) -> torch.Tensor:
        return model.generate(ids[:1], **settings, **more)

    with torch.inference_mode():
        assert torch.equal(generate(num_beams=3), generate(num_beams=3, use_cache=False))
        if case != "gemma3" and hasattr(cache_utils, "KVSharingDict"):  # no cropping of windows, nor before 5.23
            assert torch.equal(generate(prompt_lookup_num_tokens=3), generate())


def kv_bytes(cache) -> list[int]:
    """Of keys and values in each layer; 0 for one that has none."""
    found = [[getattr(layer, name, None) for name in ("keys", "values")] for layer in cache.layers]
    return [sum(tensor.nbytes for tensor in tensors if tensor is not None) for tensors in found]


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("case", CASES)
def test_cache_holds_exactly_the_owners(case, implementation, ids):
    """Layer by layer: an owner's cache is as large as in the source model, a consumer's is empty."""

    def sizes(model) -> list[int]:
        cache = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, return_dict_in_generate=True,
            cache_implementation=implementation, disable_compile=True, eos_token_id=None,
        ).past_key_values  # fmt: skip
        return kv_bytes(cache)

    sources = share(case, "cla2-keep-ends")
    with torch.inference_mode():
        before, after = sizes(source_model(case)), sizes(cla_model(case, sources))
    assert [layer for layer, size in enumerate(before) if size] == [i for i, s in enumerate(sources) if s is not None]
    assert after == [size if sources[layer] == layer else 0 for layer, size in enumerate(before)]


@pytest.mark.parametrize("case", CASES)
def test_the_cache_is_as_large_as_verify_demands(case, ids, tmp_path):
    """Computed from config.json alone, for every layer: beyond the window, too (24 tokens, windows of 8)."""
    model = cla_model(case, share(case, "cla2-keep-ends"))
    model.config.save_pretrained(tmp_path)
    with torch.inference_mode():
        cache = model(ids[:1], use_cache=True).past_key_values
        cache = model(ids[:1, :1], past_key_values=cache).past_key_values
    assert planned_bytes(tmp_path, 25) == kv_bytes(cache)


@pytest.mark.parametrize("case", CASES)
def test_gradients_do_not_depend_on_activation_checkpointing(case, ids):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = cla_model(case, share(case, "cla3")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)  # of dropout
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        if gradient is None:  # a bias that only chooses experts
            assert checkpointed[name] is None and "bias" in name, name
        else:
            assert torch.equal(gradient, checkpointed[name]), name


@pytest.mark.parametrize("case", CASES)
def test_owners_receive_gradient_through_their_consumers(case, ids):
    sources = share(case, "cla2")
    owner = next(source for layer, source in enumerate(sources) if source not in (layer, None))
    model, family = cla_model(case, sources), FAMILIES[CASES[case][0]]
    parameters = dict(model.named_parameters())
    torch.nn.init.zeros_(parameters[family.tensor(owner, family.o_proj)])  # cut the owner's own use of its K/V
    model(ids, labels=ids, use_cache=False).loss.backward()
    for module in ("k_proj", "v_proj"):
        assert parameters[family.tensor(owner, module)].grad.abs().sum() > 0


@pytest.mark.parametrize("case", CASES)
def test_consumers_have_no_kv_parameters(case):
    sources, family = share(case, "cla2"), FAMILIES[CASES[case][0]]
    kept = {family.place(name) for name, _ in cla_model(case, sources).named_parameters()}
    attending = {layer for layer, source in enumerate(sources) if source is not None}
    assert {place.layer for place in kept if place and place.module in family.kv_modules} == set(owners_of(sources))
    assert {place.layer for place in kept if place and place.module == "q_proj"} == attending


@pytest.mark.parametrize("case", CASES)
def test_reentrant_checkpointing_is_refused(case):
    with pytest.raises(ValueError, match="use_reentrant"):
        cla_model(case, share(case, "cla2")).gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("case", MIXTURES)
def test_experts_run_as_in_the_source_model(case, ids):
    """transformers allows its fast implementation to classes in whose file it finds a word, and else says nothing."""
    settings, sources = tiny_config(case).to_dict(), share(case, "cla2-keep-ends")
    settings.pop("model_type")
    classes = cla_classes(FAMILIES[CASES[case][0]])
    model = classes["ForCausalLM"](classes["Config"](**settings, kv_source_layers=sources)).eval()
    source = AutoModelForCausalLM.from_config(tiny_config(case))
    assert model.config._experts_implementation == source.config._experts_implementation == "grouped_mm"
    with torch.inference_mode():
        fast = model(ids).logits
        model.set_experts_implementation("eager")
        torch.testing.assert_close(fast, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_old_flag_for_activation_checkpointing_is_heeded(case):
    model = cla_model(case, share(case, "cla2"), gradient_checkpointing=True)
    assert all(layer.gradient_checkpointing for layer in model.get_submodule(FAMILIES[CASES[case][0]].layers))
    assert not hasattr(model.config, "gradient_checkpointing")  # used up, as in transformers


@pytest.mark.parametrize("case", CASES)
def test_attention_implementations_agree(case, ids):
    model = cla_model(case, share(case, "cla2-keep-ends"))
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        eager = model(ids).logits
        if not model._supports_sdpa or (case in ("gemma2", "vaultgemma") and not hasattr(cache_utils, "KVSharingDict")):
            pytest.skip("transformers has no sdpa with softcap, and before 5.23 leaves it out")
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(ids).logits, eager, rtol=1e-4, atol=rounding(case))


def test_flex_attention_agrees():
    """Of rows of 128 tokens: torch's kernel for processors without AVX-512 is wrong, or NaN, for some shorter ones."""
    ids = torch.randint(2, 258, (2, 128), generator=torch.Generator().manual_seed(1))
    model = cla_model("llama", MAPS["cla2-keep-ends"], head_dim=16)
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        eager = model(ids).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(ids).logits, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_padding_does_not_change_real_tokens(case, ids):
    model = cla_model(case, share(case, "cla2-keep-ends"))
    padded = torch.cat([torch.full((2, 5), 1), ids], 1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(ids)], 1)
    with torch.inference_mode():
        out = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits[:, 5:]
        torch.testing.assert_close(out, model(ids).logits, rtol=1e-4, atol=rounding(case))


@pytest.mark.parametrize("sources", [[0, 0, 2], [0, 2, 2, 3, 4, 5], [0, 0, 1, 3, 4, 5], [0, 1, 2, 3, 4, -1]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_impossible_maps_are_refused(family, sources):
    case = next(case for case, (name, _) in CASES.items() if name == family)
    with pytest.raises(ValueError, match="kv_source_layers"):
        cla_model(case, sources)


@pytest.mark.parametrize("case", CASES)
def test_layers_of_different_kinds_cannot_share(case):
    kinds = shape_of(tiny_config(case).to_dict()).kinds
    other = next((layer for layer, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is None:
        pytest.skip("all layers are of one kind")
    sources = list(range(len(kinds)))
    sources[other] = 0
    with pytest.raises(ValueError, match="kv_source_layers"):
        cla_model(case, sources)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_uptraining_is_the_models_own(case, ids):
    """Its logits come in chunks from `base_model` and the head, so it must know what a family does after the head."""
    model = cla_model(case, share(case, "cla2-keep-ends"))
    objective = Objective(Train(loss="cross_entropy"), model)
    with torch.no_grad():
        expected = model(ids, labels=ids).loss
        found, _ = objective(model, ids, None, ids.numel() - len(ids))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_save_and_load_keep_the_map(tmp_path, ids):
    register()
    model = cla_model("llama", MAPS["cla3"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.kv_source_layers == MAPS["cla3"]
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_trains_under_the_stock_trainer(tmp_path):
    rows = [{"input_ids": torch.randint(2, 12, (16,)).tolist()} for _ in range(16)]
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = cla_model("llama", MAPS["cla2-keep-ends"], initializer_range=0.02)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        gradient_checkpointing=True, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, DataCollatorForLanguageModeling(tokenizer, mlm=False), rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
