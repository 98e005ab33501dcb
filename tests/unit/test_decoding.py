"""The decode loop is transformers' model, token by token: for every family, past windows, in the middle of rows."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from cla_convert.errors import InputError
from cla_convert.models.families import FAMILIES
from cla_convert.models.shape import AttentionShape, shape_of
from cla_convert.training.decoding import Choice, Decoder, Drawn, Prompts
from tests.tiny import CASES, source_model

VOCABULARY, LENGTH = 258, 150
ENDS = {0, 1, 5, 77, 100}


def prompts(n: int = 12, longest: int = 5) -> Prompts:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(101, 250, (n, longest), generator=generator)
    tokens[:, 0] = 0  # what begins every text
    lengths = torch.randint(1, longest + 1, (n,), generator=generator)
    return Prompts(tokens, lengths, (torch.arange(n) + 1) % n, torch.ones(n, dtype=torch.bool))


def drawn(case: str, choice: Choice, seed: int = 7) -> tuple[Any, Drawn]:
    model: Any = source_model(case).float()
    decoder = Decoder(model, shape_of(model.config.to_dict()), 4, LENGTH, ENDS, choice)
    return model, decoder.draw(prompts(), torch.tensor([0, 3, 6, 9]), seed)


def texts(rows: Drawn) -> list[tuple[int, int, int]]:
    """Row, begin and end of every text."""
    found = []
    for row, begins in enumerate(rows.begins):
        places = [*begins.nonzero()[:, 0].tolist(), LENGTH]
        found += [(row, begin, end) for begin, end in pairwise(places)]
    return found


HYBRIDS = [case for case, (family, _) in CASES.items() if FAMILIES[family].state]


@pytest.mark.parametrize("case", HYBRIDS)
def test_a_state_that_goes_on_from_text_to_text_is_refused(case: str) -> None:
    with pytest.raises(InputError, match="into the next"):
        drawn(case, Choice(VOCABULARY))


@pytest.mark.parametrize("case", [case for case in CASES if case not in HYBRIDS])
def test_every_token_is_drawn_from_what_the_model_says_of_its_text_alone(case: str) -> None:
    model, rows = drawn(case, Choice(VOCABULARY))
    found = texts(rows)
    assert len(found) > 4 and max(end - begin for _, begin, end in found) > 20  # several a row, and past the windows
    for row, begin, end in found:
        ids = rows.tokens[row : row + 1, begin:end]
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        sampled = rows.sampled[row, begin + 1 : end]
        torch.testing.assert_close(
            rows.logprobs[row, begin + 1 : end][sampled], logprobs[sampled], atol=1e-4, rtol=1e-4
        )
        assert not rows.logprobs[row, begin:end][~rows.sampled[row, begin:end]].any()


@pytest.mark.parametrize(
    "case", ["llama", "qwen2-window", "gemma2", "gemma3", "smollm3", "gpt_bigcode", "ministral3", "cohere2", "gpt_oss"]
)
def test_the_likeliest_tokens_are_those_of_generate(case: str) -> None:
    model, rows = drawn(case, Choice(VOCABULARY, top_k=1))
    for row, begin, end in texts(rows):
        ids = rows.tokens[row, begin:end]
        prompt = ids[~rows.sampled[row, begin:end]][None]
        if prompt.shape[1] == ids.numel():
            continue
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_length=ids.numel(), do_sample=False,
            eos_token_id=sorted(ENDS), pad_token_id=0,
        )[0]  # fmt: skip
        assert ids.tolist() == expected[: ids.numel()].tolist()


def test_texts_begin_with_their_prompts_and_end_at_the_first_end() -> None:
    _, rows = drawn("llama", Choice(VOCABULARY))
    given = prompts()
    for row in range(4):
        of_row = [(begin, end) for found, begin, end in texts(rows) if found == row]
        for number, (begin, end) in enumerate(of_row):
            prompt = (3 * row + number) % 12
            size = min(int(given.lengths[prompt]), end - begin)
            assert rows.tokens[row, begin : begin + size].tolist() == given.tokens[prompt, :size].tolist()
            sampled = rows.tokens[row, begin + size : end].tolist()
            assert not ENDS & set(sampled[:-1])
            if end < LENGTH and sampled:  # or the next separator was drawn
                assert 0 not in sampled
    last = [rows.tokens[row, end - 1].item() for row, _, end in texts(rows) if end < LENGTH]
    assert {5, 77, 100} & set(last)


def test_turns_of_a_conversation_see_each_other() -> None:
    model = source_model("llama").float()
    given = prompts(2)
    given.opens[1] = False
    decoder = Decoder(model, shape_of(model.config.to_dict()), 3, LENGTH, ENDS - {0}, Choice(VOCABULARY))
    rows = decoder.draw(given, torch.tensor([0, 0, 0]), 3)
    both = [
        (row, begin, end)
        for row, begin, end in texts(rows)
        if (~rows.sampled[row, begin:end]).sum() == given.lengths.sum()
    ]
    assert both
    for row, begin, end in both:
        ids = rows.tokens[row : row + 1, begin:end]
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        sampled = rows.sampled[row, begin + 1 : end]
        torch.testing.assert_close(
            rows.logprobs[row, begin + 1 : end][sampled], logprobs[sampled], atol=1e-4, rtol=1e-4
        )


def test_a_seed_fixes_the_rows_and_nothing_is_left_of_the_batch_before() -> None:
    model = source_model("mistral-window").float()
    shape: AttentionShape = shape_of(model.config.to_dict())
    first = torch.tensor([0, 3, 6, 9])
    fresh = Decoder(model, shape, 4, LENGTH, ENDS, Choice(VOCABULARY)).draw(prompts(), first, 8).tokens
    decoder = Decoder(model, shape, 4, LENGTH, ENDS, Choice(VOCABULARY))
    other = decoder.draw(prompts(), first, 7).tokens.clone()
    assert decoder.draw(prompts(), first, 8).tokens.tolist() == fresh.tolist() != other.tolist()


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    kept = {p: Choice(4, top_p=p).restrict(scores).isfinite().tolist() for p in (0.4, 0.5001, 0.9, 1.0)}
    assert [sum(row[0]) for row in kept.values()] == [1, 2, 3, 4]
    assert all(row[1] == row[0][::-1] for row in kept.values())
    assert Choice(4, top_k=2).restrict(scores).isfinite().tolist() == kept[0.5001]
    assert Choice(4, top_k=1, top_p=0.99).restrict(scores).isfinite().sum() == 2
