"""Properties of the CLA modelling code that must hold exactly, on tiny random models."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments
from transformers import LlamaForCausalLM as SourceModel

from cla_convert.models.configuration_cla_llama import ClaLlamaConfig
from cla_convert.models.modeling_cla_llama import ClaLlamaForCausalLM
from tests.conftest import byte_tokenizer, tiny_llama_config

MAPS = {
    "cla2": [0, 0, 2, 2, 4, 4],
    "cla2-keep-ends": [0, 1, 1, 3, 3, 5],
    "cla3": [0, 0, 0, 3, 3, 3],
    "interleaved": [0, 1, 0, 1, 4, 1],
}
SHAPES = {
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "tie_word_embeddings": False},
    "odd": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48},
}


def build(sources: list[int] | None, seed: int = 0, **shape) -> ClaLlamaForCausalLM:
    torch.manual_seed(seed)
    settings = tiny_llama_config(**shape).to_dict()
    settings.pop("model_type")
    model = ClaLlamaForCausalLM(ClaLlamaConfig(**settings, kv_source_layers=sources)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_identity_map_is_the_source_model_exactly(shape, ids):
    torch.manual_seed(0)
    source = SourceModel(tiny_llama_config(**SHAPES[shape])).eval()
    model = build(None, **SHAPES[shape])
    assert model.load_state_dict(source.state_dict()).missing_keys == []
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, source(ids).logits)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sources", MAPS.values(), ids=MAPS)
def test_cached_uncached_stepwise_and_static_agree(sources, shape, ids):
    model = build(sources, **SHAPES[shape]).double()
    with torch.inference_mode():
        full = model(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, use_cache=True).logits, full, rtol=0, atol=0)
        cache, steps = None, []
        for i in range(ids.shape[1]):
            out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-6, atol=1e-6)
        dynamic = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        static = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
        )
    assert torch.equal(dynamic, static)


def test_generate_is_greedy_token_by_token(ids):
    model = build(MAPS["cla2-keep-ends"])
    with torch.inference_mode():
        tokens = ids
        for _ in range(8):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    assert torch.equal(generated, tokens)


@pytest.mark.parametrize("sources", MAPS.values(), ids=MAPS)
def test_cache_holds_exactly_the_owners(sources, ids):
    def cache_bytes(model) -> int:
        with torch.inference_mode():
            cache = model(ids, use_cache=True).past_key_values
        states = [state for layer in cache.layers for state in (layer.keys, layer.values) if state is not None]
        return sum(state.numel() * state.element_size() for state in states)

    assert cache_bytes(build(sources)) * len(sources) == cache_bytes(build(None)) * len(set(sources))


@pytest.mark.parametrize("sources", MAPS.values(), ids=MAPS)
def test_gradients_do_not_depend_on_activation_checkpointing(sources, ids):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = build(sources).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


def test_owners_receive_gradient_through_their_consumers(ids):
    model = build(MAPS["cla3"])
    for layer in (0, 3):  # cut the owner's own use of its keys and values
        torch.nn.init.zeros_(model.model.layers[layer].self_attn.o_proj.weight)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    assert model.model.layers[3].self_attn.v_proj.weight.grad.abs().sum() > 0


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="use_reentrant"):
        build(MAPS["cla2"]).activation_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_attention_implementations_agree(implementation, ids):
    model = build(MAPS["cla2-keep-ends"], head_dim=16)
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        eager = model(ids).logits
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(model(ids).logits, eager, rtol=1e-4, atol=1e-5)


def test_padding_does_not_change_real_tokens(ids):
    model = build(MAPS["cla2-keep-ends"])
    padded = torch.cat([torch.full((2, 5), 1), ids], 1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(ids)], 1)
    with torch.inference_mode():
        out = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits[:, 5:]
        torch.testing.assert_close(out, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_consumers_have_no_kv_parameters():
    names = {name for name, _ in build(MAPS["cla2"], attention_bias=True).named_parameters()}
    assert "model.layers.0.self_attn.k_proj.bias" in names
    assert not [name for name in names if name.startswith("model.layers.1.") and ("k_proj" in name or "v_proj" in name)]


@pytest.mark.parametrize("sources", [[0, 0, 2], [0, 2, 2, 3, 4, 5], [0, 0, 1, 3, 4, 5], [0, 1, 2, 3, 4, -1]], ids=str)
def test_impossible_maps_are_refused(sources):
    with pytest.raises(ValueError, match="kv_source_layers"):
        build(sources)


def test_save_and_load_keep_the_map(tmp_path, ids):
    from cla_convert.models.export import register

    register()
    model = build(MAPS["cla3"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.kv_source_layers == MAPS["cla3"]
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_trains_under_the_stock_trainer(tmp_path):
    rows = [{"input_ids": torch.randint(2, 12, (16,)).tolist()} for _ in range(16)]
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = build(MAPS["cla2-keep-ends"], initializer_range=0.02)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        gradient_checkpointing=True, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, DataCollatorForLanguageModeling(tokenizer, mlm=False), rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
