"""`cla-convert bench` on tiny models: caches as they really are, what fits, refusals."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cla_convert.bench import memory, speed
from cla_convert.bench.bench import bench, check_order
from cla_convert.bench.memory import MemoryBudget, capacity, fits, largest
from cla_convert.bench.speed import Work
from cla_convert.bench.subject import Subject, cache_bytes, decode, filled_cache, prefill, token_ids
from cla_convert.cli.words import numbers_of, size_of
from cla_convert.errors import InputError, UsageError
from cla_convert.evaluation.cache import kv_cache_of
from cla_convert.models.export import load_model
from tests.conftest import save_tiny_llama
from tests.integration.test_convert import convert
from tests.launch import cla

SOURCE_BYTES, CONVERTED_BYTES = 6 * 2 * 2 * 8 * 4, 4 * 2 * 2 * 8 * 4  # layers, K and V, heads, channels, float32


@pytest.fixture(scope="module")
def converted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "converted"
    convert(tiny_llama, out, "--init", "mean")
    return out


def subject(folder: Path, name: str = "source") -> Subject:
    return Subject(name, folder, load_model(folder), "cpu")


def test_bench_through_the_command_line(tiny_llama: Path, converted: Path, tmp_path: Path):
    out = tmp_path / "out"
    done = cla("bench", tiny_llama, converted, "--json", "--out", out, "--memory", "1MB", "--prompt", 12, "--new", 4,
               "--batch-sizes", "1,2,100000", "--device", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((out / "bench.json").read_text())
    source, ours = result["models"]["source"], result["models"]["converted"]
    assert source["kv"]["layer_bytes_per_token"] == [128.0] * 6
    assert ours["kv"]["layer_bytes_per_token"] == [128.0, 128.0, 0.0, 128.0, 0.0, 128.0]
    # The same memory, to the last sequence: weights + batch x tokens x bytes <= budget.
    for model, size in ((source, SOURCE_BYTES), (ours, CONVERTED_BYTES)):
        room = 1_000_000 - model["weight_bytes"]
        assert model["largest_batch"] == room // (16 * size)
        assert model["longest_context"] == room // (64 * size) * 64
    rows = {(row["model"], row["phase"], row["batch"]): row for row in result["speed"]}
    assert (
        rows["source", "prefill", 100_000]["fits"] is rows["source", "decode", ours["largest_batch"]]["fits"] is False
    )
    assert len(rows["converted", "decode", ours["largest_batch"]]["runs"]) == speed.TURNS
    text = (out / "bench.md").read_text()
    assert "| KV bytes per token, measured | 768 | 512 | 1.50x smaller |" in text and "does not fit" in text
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_filled_cache_is_what_a_prefill_leaves(converted: Path):
    ours = subject(converted)
    real, filled = prefill(ours.model, 3, 100), filled_cache(ours.model, 3, 100)
    assert cache_bytes(filled) == cache_bytes(real) == 3 * 100 * CONVERTED_BYTES
    for left, right in zip(real.layers, filled.layers, strict=True):
        assert (left.keys is None) == (right.keys is None)
        if left.keys is not None:
            assert left.keys.shape == right.keys.shape
            torch.testing.assert_close(left.keys[:, :, :64], right.keys[:, :, :64])  # the prototype's 64 positions
    decode(ours.model, filled, 3, 2)
    assert filled.get_seq_length() == 102


def test_a_sliding_window_is_filled_no_further_than_it_reaches(tmp_path: Path):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, sliding_window=16, layer_types=kinds, max_position_embeddings=512,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    ours = subject(tmp_path)
    filled = filled_cache(ours.model, 2, 100)
    assert [layer.keys.shape[2] for layer in filled.layers] == [15, 100, 15, 100]
    decode(ours.model, filled, 2, 1)
    assert filled.get_seq_length() == 101
    # Beyond the window only the full layers grow, so far more fits than the growth of a short cache suggests.
    budget = MemoryBudget(ours.weight_bytes + 2**20, "cpu")
    found = capacity(ours, budget, 100)
    full, windows = 2 * 2 * 8 * 4, 2 * 2 * 8 * 4 * 15
    assert found["longest_context"] == (2**20 - windows) // (64 * full) * 64


def test_the_cached_decoding_that_is_timed_is_the_models_own(tiny_llama: Path):
    """Decoding token by token over a real cache gives the logits of one pass over everything."""
    model = load_model(tiny_llama)
    ids = token_ids(model, 2, 20)
    with torch.no_grad():
        whole = model(ids).logits[:, -1]
        cache = prefill(model, 2, 19)
        last = model(input_ids=ids[:, 19:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-4)


def test_running_out_of_memory_is_an_answer(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    def exhausted(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    plenty = MemoryBudget(2**30, "cpu")
    assert capacity(subject(tiny_llama), MemoryBudget(2**19, "cpu"), 8)["largest_batch"] > 0
    monkeypatch.setattr(memory, "filled_cache", exhausted)
    monkeypatch.setattr(speed, "filled_cache", exhausted)
    ours = subject(tiny_llama)
    assert fits(ours, plenty, 1, 8) is False
    assert capacity(ours, plenty, 8) == {"largest_batch": 0, "longest_context": 0}
    rows = speed.measure_speed([ours], {"source": [("prefill", 1), ("decode", 1)]}, plenty, Work(8, 4, 60))
    assert [row["fits"] for row in rows] == [True, False]


def test_a_time_limit_costs_turns_and_tokens_of_the_slow_cases_and_says_so(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a clock that every decoded token moves by one second, a token of batch 9 by three."""
    now, decoded = [0.0], []

    def slow(_model, _cache, batch: int, steps: int) -> None:
        now[0] += steps * (3 if batch == 9 else 1)
        decoded.append((batch, steps))

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(speed, "decode", slow)
    monkeypatch.setattr(speed, "RUN_SECONDS", 6)
    both = [subject(tiny_llama, name) for name in ("source", "converted")]
    cases = {name: [("decode", 1), ("decode", 9)] for name in ("source", "converted")}
    rows = speed.measure_speed(both, cases, MemoryBudget(2**30, "cpu"), Work(8, 33, 84))
    # Batch 1 takes 6 tokens and one to warm up, batch 9 the 4 that are the least: rounds of 14 and 30 seconds.
    assert decoded[:8] == [(1, 1), (1, 6)] * 2 + [(9, 1), (9, 4)] * 2
    assert {(row["batch"], len(row["runs"]), row["steps"]) for row in rows} == {(1, 3, 6), (9, 1, 4)}
    assert [row["tokens_per_second"] for row in rows if row["batch"] == 9] == [3.0, 3.0]
    assert now[0] == 3 * 14 + 30 <= 84
    assert speed.cut(rows, 33) == [
        "decode at batch 1: 3 of 5 turns, 6 of 32 tokens",
        "decode at batch 9: 1 of 5 turns, 4 of 32 tokens",
    ]
    plenty = speed.measure_speed(both, cases, MemoryBudget(2**30, "cpu"), Work(8, 4, 10**6))
    assert {len(row["runs"]) for row in plenty} == {speed.TURNS} and speed.cut(plenty, 4) == []


def test_a_gpu_is_capped_at_the_budget_and_the_other_models_weights(monkeypatch: pytest.MonkeyPatch):
    """The calls to torch, which has no GPU here: a fraction of the whole memory, for a device by number."""
    calls: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *call: calls.append(call))
    for device, index in (("cuda", 0), ("cuda:3", 3)):
        with pytest.raises(torch.OutOfMemoryError), MemoryBudget(7 * 10**9, device).cap(others=10**9):
            raise torch.OutOfMemoryError
        assert calls[-2:] == [(0.1, index), (1.0, index)]


@pytest.mark.parametrize("answer", [0, 1, 2, 7, 64, 1000])
@pytest.mark.parametrize("guess", [0, 1, 6, 8, 990, 5000])
def test_the_search_finds_the_largest_wherever_it_starts(answer: int, guess: int):
    tried: list[int] = []

    def holds(n: int) -> bool:
        tried.append(n)
        return n <= answer

    assert largest(holds, guess, limit=1 << 20) == answer
    assert len(tried) <= 30 and max(tried) <= max(guess, 2 * answer, 1) + 2
    assert largest(lambda _: True, guess, limit=4096) == 4096
    tried.clear()
    close = largest(holds, guess, limit=1 << 20, tolerance=0.1)
    assert close <= answer <= close + max(0, int(0.1 * close)) and len(tried) <= 30


def test_what_cannot_be_compared_is_refused(tiny_llama: Path, converted: Path, tmp_path: Path):
    done = cla("bench", tiny_llama, converted, "--memory", "1KB", "--device", "cpu")
    assert done.returncode == 3 and "The weights alone take" in done.stderr and "Traceback" not in done.stderr
    other = save_tiny_llama(tmp_path / "other", hidden_size=64)
    for model, options, words in [
        (other, {}, "hidden_size is 32"),
        (converted, {"memory": 10**18}, "is more than the"),
        (converted, {"prompt": 600}, "more than the 512"),
    ]:
        with pytest.raises(InputError, match=words):
            bench(tiny_llama, model, device="cpu", **options)
    for parse, text in [(size_of, "much"), (size_of, "0GB"), (numbers_of, "1,x"), (numbers_of, "0"), (numbers_of, "")]:
        with pytest.raises(UsageError, match="--option"):
            parse(text, "--option")


def test_layers_add_up_to_the_cache(converted: Path):
    found = kv_cache_of(load_model(converted), 16)
    assert sum(found["layer_bytes_per_token"]) == found["bytes_per_token"] == CONVERTED_BYTES


def test_fewer_heads_make_a_smaller_cache_as_shared_layers_do(tiny_llama: Path, tmp_path: Path):
    out = tmp_path / "one-head"
    done = cla("convert", tiny_llama, out, "--sharing", "cla1", "--kv-heads", "1", "--init", "mean")
    assert done.returncode == 0, done.stderr
    check_order(tiny_llama, out, "turned")
    with pytest.raises(UsageError, match=r"wrong way round(.|\n)*turned"):
        check_order(out, tiny_llama, "turned")
