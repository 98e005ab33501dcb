"""Ways in which transformers generates, on converted models as users load them: what docs/serving.md lists."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from tests.integration.test_convert import convert
from tests.tiny import save_tiny

PROMPT = torch.randint(2, 258, (1, 20), generator=torch.Generator().manual_seed(3))  # longer than Gemma's window of 8
NEW = 12


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def folder(request, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("modes")
    convert(save_tiny(request.param, out / "source"), out / "converted", "--init", "mean", "--sharing", "cla2")
    return out / "converted"


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def generate(model: Any, ids: torch.Tensor = PROMPT, **options: Any) -> list[list[int]]:
    """The new tokens."""
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW}
    settings |= {"eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        return model.generate(ids, **settings | options)[:, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def expected(model: Any) -> list[list[int]]:
    """Greedy decoding without generate and without a cache."""
    ids = PROMPT
    with torch.inference_mode():
        for _ in range(NEW):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[:, PROMPT.shape[1] :].tolist()


def owners(model: Any) -> int:
    return len(set(model.config.kv_source_layers))


def test_dynamic_and_static_caches_hold_owners_only(model: Any, expected: list[list[int]]):
    for name in ("dynamic", "static"):
        found = model.generate(
            PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, max_new_tokens=NEW, eos_token_id=None,
            pad_token_id=0, cache_implementation=name, disable_compile=True, return_dict_in_generate=True,
        )  # fmt: skip
        assert found.sequences[:, PROMPT.shape[1] :].tolist() == expected
        held = [layer for layer in found.past_key_values.layers if isinstance(layer.keys, torch.Tensor)]
        assert len(held) == owners(model) < model.config.num_hidden_layers


@pytest.mark.timeout(900)
def test_a_static_cache_with_torch_compile(model: Any, expected: list[list[int]]):
    """What generate does on a GPU when asked for a static cache, whole-graph compilation included."""
    torch.compiler.reset()
    forward = model.forward
    try:
        model.forward = torch.compile(forward, fullgraph=True, backend="aot_eager")
        assert generate(model, cache_implementation="static", disable_compile=True) == expected
    finally:
        model.forward = forward


def test_beam_search(model: Any):
    beams = {"num_beams": 3, "num_return_sequences": 3}
    assert generate(model, **beams) == generate(model, **beams, use_cache=False)


def test_assisted_generation(model: Any, expected: list[list[int]], folder: Path):
    source = AutoModelForCausalLM.from_pretrained(folder.parent / "source", dtype=torch.float32).eval()
    assert generate(model, assistant_model=source) == expected
    assert generate(model, prompt_lookup_num_tokens=3) == expected
    assert generate(source, assistant_model=model) == generate(source)


def test_a_padded_batch(model: Any):
    short, long = PROMPT[:, :11], PROMPT
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), short], 1)
    both, mask = torch.cat([padded, long]), torch.ones(2, 20, dtype=torch.long)
    mask[0, :9] = 0
    assert generate(model, both, attention_mask=mask) == generate(model, short) + generate(model, long)


def test_a_pipeline(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    writes = pipeline(
        "text-generation", model=str(folder), tokenizer=tokenizer, trust_remote_code=True, dtype="float32"
    )
    text = "The quick brown fox jumps"
    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = writes(text, generation_config=greedy, return_tensors=True)[0]["generated_token_ids"]
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert found == ids[0].tolist() + generate(writes.model, ids)[0]


def test_a_quantised_cache_is_refused_in_words(model: Any):
    """transformers' own refusal: it knows no quantised cache in which some layers hold nothing."""
    with pytest.raises(ValueError, match="dummy"):
        generate(model, cache_implementation="quantized")


def test_continuous_batching_answers_right_and_saves_nothing(model: Any, expected: list[list[int]]):
    from transformers.generation.continuous_batching import cache as paged

    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    paged_layers = []
    original = paged.PagedAttentionCache.__init__

    def look(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        paged_layers.append(len(self.layer_to_allocator))

    paged.PagedAttentionCache.__init__ = look
    try:
        found = model.generate_batch([PROMPT[0].tolist()], generation_config=greedy)
    finally:
        paged.PagedAttentionCache.__init__ = original
    assert [list(answer.generated_tokens) for answer in found.values()] == expected
    assert paged_layers == [model.config.num_hidden_layers]
