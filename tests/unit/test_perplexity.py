import math

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from cla_convert.evaluation.perplexity import token_perplexity
from cla_convert.models import scoring
from tests.conftest import tiny_llama_config


def reference(model, rows: torch.Tensor) -> float:
    """Mean nats per token straight from the definition, all logits at once."""
    with torch.no_grad():
        log_probabilities = model(rows).logits[:, :-1].double().log_softmax(-1)
    return -log_probabilities.gather(-1, rows[:, 1:, None]).mean().item()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config()).eval()


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(0, 258, (5, 33), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_equals_the_definition_whatever_the_batch(model, rows, batch_size):
    result = token_perplexity(model, rows, batch_size=batch_size)
    assert result["tokens"] == 5 * 32
    assert result["nll"] == pytest.approx(reference(model, rows), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(result["nll"]))


def test_logits_exist_for_a_few_positions_at_a_time(model, rows, monkeypatch):
    sizes = []
    monkeypatch.setattr(scoring, "_LOGITS", 258 * 7)
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    try:
        result = token_perplexity(model, rows)
    finally:
        hook.remove()
    assert max(sizes[2:]) == 258 * 7  # the first two calls are the check on 8 positions of one row
    assert result["nll"] == pytest.approx(reference(model, rows), rel=1e-6)


def test_capped_logits_are_the_models_own():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.5, bos_token_id=0,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    ids = torch.randint(2, 258, (3, 17))
    assert token_perplexity(model, ids)["nll"] == pytest.approx(reference(model, ids), rel=1e-5)


def test_leaves_the_training_mode_and_the_gradients_alone(model, rows):
    model.train()
    token_perplexity(model, rows)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    token_perplexity(model, rows)
    assert not model.training


@pytest.mark.parametrize("shape", [(3,), (0, 8), (2, 1)])
def test_refuses_rows_that_predict_nothing(model, shape):
    with pytest.raises(ValueError, match="shape"):
        token_perplexity(model, torch.zeros(shape, dtype=torch.long))
