"""The parts of the training engine: what is trained, how large a pass is, what it costs, when a run is stopped."""

import itertools
import math
import sys
from typing import Any, Literal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaForCausalLM,
)

from cla_convert import bars
from cla_convert.amounts import clock
from cla_convert.errors import InputError
from cla_convert.models.generated.configuration_cla_llama import ClaLlamaConfig
from cla_convert.models.generated.modeling_cla_llama import ClaLlamaForCausalLM
from cla_convert.models.scoring import hidden_states
from cla_convert.recipe import Train
from cla_convert.run_folder import TrainingFolder
from cla_convert.training import compiling
from cla_convert.training.compiling import WORTH_IT, choose_compile, compile_layers
from cla_convert.training.derived import derived
from cla_convert.training.divergence import PATIENCE, steps_above
from cla_convert.training.flops import forward_flops, peak_flops, training_flops
from cla_convert.training.loss import LogitRule
from cla_convert.training.metrics import Metrics
from cla_convert.training.monitor import Monitor, describe
from cla_convert.training.objective import check_documents, check_head, chunk_size, stream_distance
from cla_convert.training.optimizer import freeze_all_but, make_optimizer, parts_of
from cla_convert.training.precision import Precision, cast_frozen, choose_precision
from cla_convert.training.rates import with_rates
from cla_convert.training.schedule import Budget
from cla_convert.training.trackers import TensorBoard
from cla_convert.training.trainer import rates_told, without_dropout

from ..conftest import tiny_llama_config
from ..tiny import cla_model, source_model

MAP = [0, 1, 1, 3, 3, 5]


def student(**settings) -> ClaLlamaForCausalLM:
    torch.manual_seed(0)
    config = tiny_llama_config(**settings).to_dict() | {"kv_source_layers": MAP}
    return ClaLlamaForCausalLM(ClaLlamaConfig(**{k: v for k, v in config.items() if k != "model_type"}))


IDS = torch.randint(0, 258, (2, 32), generator=torch.Generator().manual_seed(0))


class TestWhatIsTrained:
    def test_parts(self) -> None:
        parts = {name: part for name, _, part in parts_of(student())}
        assert parts["model.layers.0.self_attn.q_proj.weight"] == "attention"
        assert parts["model.layers.1.self_attn.k_proj.weight"] == parts["model.layers.4.self_attn.o_proj.weight"]
        assert parts["model.layers.1.self_attn.k_proj.weight"] == "shared"
        assert parts["model.layers.1.mlp.up_proj.weight"] == parts["model.embed_tokens.weight"] == "other"

    @pytest.mark.parametrize("wanted", ["all", "attention", "shared"])
    def test_only_the_wanted_parts_get_gradients(self, wanted: str) -> None:
        model = student()
        freeze_all_but(model, wanted)  # type: ignore[arg-type]
        kept = {"all": {"shared", "attention", "other"}, "attention": {"shared", "attention"}, "shared": {"shared"}}
        assert all(p.requires_grad == (part in kept[wanted]) for _, p, part in parts_of(model))

    def test_a_model_that_shares_nothing_is_refused(self) -> None:
        with pytest.raises(InputError, match="nothing to train"):
            freeze_all_but(LlamaForCausalLM(tiny_llama_config()), "shared")

    def test_every_part_has_its_rate_and_only_matrices_decay(self) -> None:
        train = Train(learning_rate=1.0, learning_rates={"attention": 2.0, "shared": 3.0}, weight_decay=0.1)
        model = student()
        optimizer = make_optimizer(model, train, "cpu")
        found = {p: (g["peak"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        for _, parameter, part in parts_of(model):
            peak = {"other": 1.0, "attention": 2.0, "shared": 3.0}[part]
            assert found.pop(parameter) == (peak, 0.1 if parameter.ndim >= 2 else 0.0)
        assert not found

    def test_the_rate_of_attention_is_also_that_of_shared_attention(self) -> None:
        rates = Train(learning_rate=1.0, learning_rates={"attention": 2.0})
        optimizer = make_optimizer(student(), rates, "cpu")
        assert {group["peak"] for group in optimizer.param_groups} == {1.0, 2.0}


class TestPrecision:
    def test_a_working_copy_computes_in_bfloat16_and_trains_float32(self) -> None:
        model, precision = student(), Precision("cpu", torch.bfloat16)
        exact = torch.autograd.grad(hidden_states(model, IDS).pow(3).mean(), model.model.embed_tokens.weight)[0]
        with precision.working_copy(model):
            assert model.lm_head.weight is model.model.embed_tokens.weight  # still tied
            for _ in range(2):  # two micro-batches through one copy
                hidden = hidden_states(model, IDS)
                assert hidden.dtype == torch.bfloat16
                hidden.float().pow(3).mean().backward()
        weight = model.model.embed_tokens.weight
        assert weight.dtype == weight.grad.dtype == torch.float32 and isinstance(weight, torch.nn.Parameter)
        assert (weight.grad / 2 - exact).norm() < 0.1 * exact.norm()
        assert hidden_states(model, IDS).dtype == torch.float32

    @pytest.mark.parametrize("wanted", ["all", "attention"])
    def test_biases_that_choose_experts_are_neither_trained_nor_rounded(
        self, wanted: Literal["all", "attention"]
    ) -> None:
        model, precision = cla_model("ernie4_5_moe", [0, 0, 2, 2, 4, 4]), Precision("cpu", torch.bfloat16)
        name = "model.layers.2.mlp.gate.moe_statics.e_score_correction_bias"
        bias = model.get_parameter(name)
        bias.data += 8 + 1e-3 * torch.randn(bias.shape)
        before = bias.clone()
        freeze_all_but(model, wanted)
        cast_frozen(model, torch.bfloat16)
        with precision.working_copy(model):
            assert torch.equal(model.get_parameter(name), before) and not bias.requires_grad
            assert model.lm_head.weight.dtype == torch.bfloat16
            assert hidden_states(model, IDS).isfinite().all()

    def test_float32_is_left_alone(self) -> None:
        model = student()
        before = hidden_states(model, IDS)
        with choose_precision("float32", "cpu").working_copy(model):
            assert torch.equal(hidden_states(model, IDS), before)

    def test_tf32_lasts_as_long_as_the_working_copy(self) -> None:
        with choose_precision("tf32", "cpu").working_copy(student()):
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == "highest"


class TestCompiling:
    @pytest.fixture(autouse=True)
    def compiler(self, monkeypatch: pytest.MonkeyPatch):
        """Traces and differentiates as always, but runs the graph as it is: seconds instead of a minute."""
        torch._dynamo.reset()
        compiled = torch.compile(compiling._layer, dynamic=False, backend="aot_eager", fullgraph=True)
        calls = []

        def counted(*args):
            calls.append(args)
            return compiled(*args)

        monkeypatch.setattr(compiling, "_compiled_layer", lambda: counted)
        yield calls
        torch._dynamo.reset()

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_compiled_layers_give_the_same_and_each_kind_is_compiled_once(
        self, checkpointing: bool, compiler: list
    ) -> None:
        model = student().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        parameters = list(model.model.parameters())
        expected = hidden_states(model, IDS)
        gradients = torch.autograd.grad(expected.pow(3).mean(), parameters)
        torch._dynamo.utils.counters.clear()
        compile_layers(model, *IDS.shape)
        for _ in range(2):
            hidden = hidden_states(model, IDS)
            torch.testing.assert_close(hidden, expected)
            for mine, theirs in zip(torch.autograd.grad(hidden.pow(3).mean(), parameters), gradients, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # alone, owner, consumer
        assert len(compiler) == 2 * len(MAP) * (2 if checkpointing else 1)  # recomputed in the backward pass

    def test_another_shape_runs_as_before(self) -> None:
        model = student()
        expected = hidden_states(model, IDS[:1])
        torch._dynamo.utils.counters.clear()
        compile_layers(model, *IDS.shape)
        assert torch.equal(hidden_states(model, IDS[:1]), expected)
        assert not torch._dynamo.utils.counters["stats"]

    def test_it_is_chosen_where_it_pays(self) -> None:
        assert choose_compile(True, "cpu", 0) and not choose_compile("auto", "cpu", 1e30)
        assert not choose_compile(False, "cuda", 1e30) and not choose_compile("auto", "cuda", WORTH_IT / 2)

    def test_it_needs_triton_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        assert not choose_compile("auto", "cuda", 1e30)
        with pytest.raises(InputError, match="Triton"):
            choose_compile(True, "cuda", 0)
        monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
        assert choose_compile("auto", "cuda", WORTH_IT) and choose_compile(True, "cuda", 0)


class TestCost:
    @pytest.mark.parametrize("tied", [True, False])
    def test_flops_are_those_that_torch_counts(self, tied: bool) -> None:
        model = student(tie_word_embeddings=tied)
        model.set_attn_implementation("eager")  # torch counts no fused attention on a CPU
        with FlopCounterMode(display=False) as counter:
            loss = model(IDS, labels=IDS).loss
        assert counter.get_total_flops() == IDS.numel() * forward_flops(model, IDS.shape[1])
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        assert counter.get_total_flops() == IDS.numel() * 2 * forward_flops(model, IDS.shape[1])

    def test_training_counts_the_teacher_and_what_is_frozen(self) -> None:
        model = student()
        forward = forward_flops(model, 32)
        assert training_flops(model, None, 32) == 3 * forward
        assert training_flops(model, model, 32) == 4 * forward
        freeze_all_but(model, "attention")
        frozen = sum(p.numel() for _, p, part in parts_of(model) if part == "other" and p.ndim == 2)
        assert training_flops(model, None, 32) == 3 * forward - 2 * frozen

    @pytest.mark.parametrize(
        ("name", "peak"),
        [
            ("NVIDIA H200", 989e12),
            ("NVIDIA H100 80GB HBM3", 989e12),
            ("NVIDIA H100 PCIe", 756e12),
            ("NVIDIA A100-SXM4-80GB", 312e12),
            ("NVIDIA L40", 181e12),
            ("NVIDIA L4", 121e12),
            ("NVIDIA RTX A1000 Laptop GPU", None),
        ],
    )
    def test_the_peak_goes_by_the_devices_name(self, name: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        assert peak_flops("cuda:0", torch.bfloat16) == peak
        assert peak_flops("cuda:0", torch.float32) is None and peak_flops("cpu", torch.bfloat16) is None

    def test_chunks_are_powers_of_two(self) -> None:
        assert chunk_size(torch.empty(49152, 1)) == 256
        assert chunk_size(torch.empty(10**7, 1)) == 16


SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
    num_key_value_heads=2, initializer_range=1.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


class TestHeads:
    @pytest.mark.parametrize(
        "config",
        [
            Gemma2Config(**SIZES, final_logit_softcapping=3.0),
            GraniteConfig(**SIZES, logits_scaling=8.0),
            CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.25),
        ],
        ids=["gemma2", "granite", "cohere"],
    )
    def test_scaled_and_capped_logits_are_understood(self, config) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        check_head(model)

    def test_logits_that_the_config_does_not_explain_are_refused(self) -> None:
        model = student()
        forward = model.forward

        def sharpened(*args, **kwargs):
            output = forward(*args, **kwargs)
            output.logits = 1.5 * output.logits
            return output

        model.forward = sharpened
        with pytest.raises(InputError, match="cannot be uptrained"):
            check_head(model)

    def test_the_rules_of_the_families_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = AutoModelForCausalLM.from_config(GraniteConfig(**SIZES, logits_scaling=8.0))
        monkeypatch.setattr("cla_convert.training.objective.logit_rule", lambda _: LogitRule())
        with pytest.raises(InputError, match="cannot be uptrained"):
            check_head(model)


class TestDocumentsOfARow:
    @pytest.mark.parametrize("kind", ["mixtral", "gemma2", "gpt_bigcode"])
    def test_are_apart(self, kind: str) -> None:
        check_documents(source_model(kind))

    def test_that_are_not_apart_are_refused(self) -> None:
        """As those of GPT-OSS in transformers 5.23, which does not tell its mask of the positions."""
        model = student()
        forward = model.base_model.forward
        model.base_model.forward = lambda input_ids, position_ids, use_cache: forward(input_ids, use_cache=use_cache)
        with pytest.raises(InputError, match="document_masking does nothing to models of type 'cla_llama'"):
            check_documents(model)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("starcoder2", ["attention_dropout", "residual_dropout", "embedding_dropout"]),
        ("granite", ["attention_dropout"]),
        ("gpt_bigcode", ["attn_pdrop", "resid_pdrop", "embd_pdrop"]),
    ],
)
def test_nothing_is_dropped_in_training(kind: str, keys: list[str]) -> None:
    model = source_model(kind, **dict.fromkeys(keys, 0.5))
    expected = model.eval()(IDS).logits
    model.train()
    assert not torch.allclose(model(IDS).logits, expected, atol=1e-3)
    without_dropout(model)
    torch.testing.assert_close(model(IDS).logits, expected)


def test_a_resumed_run_replaces_what_its_predecessor_wrote_too_far(tmp_path) -> None:
    for step, value in ((0, 1.0), (3, 2.0)):
        board = TensorBoard(TrainingFolder(tmp_path, tmp_path / "model"), step, {"seed": 0})
        for later in range(step + 1, 6):
            board.log({"step": later, "loss": value})
        board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)
    ]  # fmt: skip


class TestHealth:
    def test_a_loss_that_stays_high_is_a_spike_and_a_single_one_is_not(self) -> None:
        calm = [1.0 + 0.1 * (i % 3) for i in range(50)]
        assert steps_above(calm, 2.0) == 0
        assert steps_above([*calm, 9.0], 2.0) == 1
        assert steps_above([*calm, 9.0, 1.0], 2.0) == 0
        assert steps_above(calm + [2.5] * PATIENCE, 2.0) == PATIENCE
        assert steps_above(calm + [2.5] * PATIENCE, 3.0) == steps_above(calm + [2.5] * PATIENCE, 0) == 0
        assert steps_above(calm + [2.5] * (PATIENCE + 7), 2.0) == PATIENCE

    def test_nothing_is_judged_at_the_start(self) -> None:
        assert steps_above([1.0] * 19 + [50.0] * PATIENCE, 2.0) < PATIENCE
        assert steps_above([1.0] * 20 + [50.0] * PATIENCE, 2.0) == PATIENCE

    def test_a_falling_loss_is_fine(self) -> None:
        assert not any(steps_above([math.exp(-i / 20) for i in range(n)], 2.0) for n in range(200))


ROW = {"step": 1, "tokens": 64, "loss": 0.5, "kl": 0.4, "cross_entropy": 3.0, "lr": 1e-3, "grad_norm": 0.25,
       "tokens_per_second": 32.0, "mfu": 0.415, "peak_memory_bytes": 2**30}  # fmt: skip


class TestMonitor:
    def test_a_line_has_what_a_person_watches(self) -> None:
        assert describe(ROW, 21.25) == (
            "loss 0.5000, KL 0.4000, CE 3.0000, validation ppl 21.25, |g| 0.25, lr 1.0e-03, MFU 42%, 1.0 GiB"
        )

    def test_in_a_log_file_lines_come_now_and_then_and_at_the_end(self, tmp_path, capsys, monkeypatch) -> None:
        budget = Budget(sequences=10, batch=1, length=64)
        seconds = itertools.count(100.0, 3.0)
        monkeypatch.setattr("cla_convert.training.monitor.time.monotonic", lambda: next(seconds))
        with Monitor(budget, 0, Metrics(tmp_path / "metrics.jsonl"), []) as monitor:
            for step in range(1, 11):
                monitor.step(ROW | {"step": step, "tokens": step * 64})
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("step 1/10, 64 of 640 tokens, 32/s, 0:18 left, loss 0.5000")
        assert 3 <= len(lines) < 10 and lines[-1].startswith("step 10/10, 640 of 640 tokens, 32/s, 0:00 left")

    def test_on_a_terminal_there_is_a_bar(self, tmp_path, capsys, monkeypatch) -> None:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        with Monitor(Budget(2, 1, 64), 0, Metrics(tmp_path / "metrics.jsonl"), []) as monitor:
            monitor.validation({"step": 0, "tokens": 0, "validation_perplexity": 30.0})
            monitor.step(ROW)
        shown = capsys.readouterr().err
        assert "loss 0.5, ppl 30" in shown and "50%" in shown

    def test_the_bar_moves_with_every_micro_batch_and_never_beyond_the_step(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        with Monitor(Budget(4, 2, 64), 0, Metrics(tmp_path / "metrics.jsonl"), []) as monitor:
            for done in (64, 128):
                bars.tick("tokens", 64)
                assert monitor._bar.n == done
            monitor.step(ROW | {"tokens": 128})
            assert monitor._bar.n == 128

    def test_what_is_not_finite_is_null_in_the_file(self, tmp_path) -> None:
        metrics = Metrics(tmp_path / "metrics.jsonl")
        metrics.write({"step": 1, "validation_perplexity": math.inf})
        metrics.close()
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "validation_perplexity": null}\n'

    def test_clock(self) -> None:
        assert [clock(seconds) for seconds in (7, 61, 3723)] == ["0:07", "1:01", "1:02:03"]


class TestRates:
    """What `learning_rate: auto` comes to."""

    def rates(self, train: Train, *, larger: float = 1.0) -> tuple[float, float]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_llama_config())
        for name, parameter in model.named_parameters():
            size = {"attn": 0.2, "mlp": 0.1}.get(next((k for k in ("attn", "mlp") if k in name), ""), 7.0)
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=size * larger)
        found = with_rates(train, model)
        assert isinstance(found.learning_rate, float)
        return found.learning_rates["attention"], found.learning_rate

    def test_they_follow_the_size_of_the_weights_and_attention_is_ahead(self) -> None:
        attention, rest = self.rates(Train())
        assert (attention, rest) == (pytest.approx(0.005 * 0.2, rel=0.05), pytest.approx(0.001 * 0.1, rel=0.05))
        assert self.rates(Train(), larger=1 / 8) == (
            pytest.approx(attention / 8, rel=0.06),
            pytest.approx(rest / 8, rel=0.06),
        )
        assert self.rates(Train(loss="cross_entropy")) == (attention, pytest.approx(5 * rest, rel=0.06))

    def test_few_steps_are_smaller_ones(self) -> None:
        settled = self.rates(Train())
        for steps, factor in ((9, 0.3), (100, 1.0), (1000, 1.0)):
            found = self.rates(Train(tokens=steps * 1024, batch_tokens=1024))
            assert found == tuple(pytest.approx(rate * factor, rel=0.06) for rate in settled)

    def test_what_is_given_stays(self) -> None:
        model = LlamaForCausalLM(tiny_llama_config())
        given = Train(learning_rate=3e-4)
        assert with_rates(given, model) == given
        assert with_rates(Train(learning_rates={"attention": 5e-4}), model).learning_rates == {"attention": 5e-4}

    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"learning_rate": 3e-4}, "learning rate 0.0003"),
            ({"learning_rates": {"attention": 5e-4}}, "learning rate 0.0005 attention, 0.0003 the rest"),
            ({"learning_rates": {"shared": 1e-3}}, "learning rate 0.001 shared, 0.0003 attention, 0.0003 the rest"),
            ({"learning_rates": {"other": 1e-4}}, "learning rate 0.0003 attention, 0.0001 the rest"),
            (
                {"learning_rates": {"shared": 1e-3}, "parameters": "attention"},
                "learning rate 0.001 shared, 0.0003 attention",
            ),
            ({"learning_rates": {"attention": 5e-4}, "parameters": "shared"}, "learning rate 0.0005"),
            ({"learning_rates": {"other": 1e-4}, "parameters": "attention"}, "learning rate 0.0003"),
        ],
    )
    def test_those_of_what_is_trained_are_told(self, settings: dict[str, Any], told: str) -> None:
        assert rates_told(Train.model_validate({"learning_rate": 3e-4} | settings)) == told

    def test_they_are_never_zero_nor_no_number(self) -> None:
        model = LlamaForCausalLM(tiny_llama_config())
        for part in ("attn", "mlp"):  # attention alone, as an adapter begins; then everything
            for name, parameter in model.named_parameters():
                if part in name:
                    parameter.data.zero_()
            if part == "attn":
                found = with_rates(Train(), model)
                assert isinstance(found.learning_rate, float)
                assert found.learning_rate > 0
                assert found.learning_rates["attention"] == pytest.approx(5 * found.learning_rate, rel=0.06)
        with pytest.raises(InputError, match="all zero"):
            with_rates(Train(), model)
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
        with pytest.raises(InputError, match="not finite"):
            with_rates(Train(), model)


class TestStreamDistance:
    """How far the student's residual streams lie from the teacher's."""

    @pytest.mark.parametrize("fused", [False, True])
    def test_it_is_relative_to_the_longer_of_both(self, fused: bool) -> None:
        stream, target, counted = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)
        stream[0, :, 0], target[0, :, 1] = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0])
        both = stream_distance([stream], [target], counted, fused=fused)
        assert float(both) == pytest.approx((1 + 4) / 4 + (9 + 1) / 9)
        counted[0, 1] = False
        first = stream_distance([stream, target], [target, target], counted, fused=fused)
        assert float(first) == pytest.approx(5 / 4 / 2)

    def test_a_stream_that_runs_away_outweighs_nothing(self) -> None:
        """As where the student makes a massive activation and the teacher does not: one of SmolLM2's is 25,000 long."""
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(1, 64, 8, generator=generator)
        stream = target + 0.1 * torch.randn(1, 64, 8, generator=generator)
        stream[0, 7] *= 1000
        stream.requires_grad_()
        stream_distance([stream], [target], torch.ones(1, 64, dtype=torch.bool)).backward()
        assert stream.grad is not None
        lengths = (one.detach().square().sum(-1, keepdim=True) for one in (stream, target))
        expected = 2 * (stream.detach() - target) / torch.maximum(*lengths)  # the length is a constant
        torch.testing.assert_close(stream.grad, expected)
        assert float((stream.grad * stream.detach())[0, 7].norm()) < 4


class TestDerived:
    """What `hidden_weight: auto` comes to."""

    def test_a_teacher_of_this_size_is_followed_inside(self) -> None:
        config = tiny_llama_config()
        assert derived(Train(), config, config).hidden_weight == 30
        assert derived(Train(hidden_weight=1.0), config, config).hidden_weight == 1
        assert derived(Train(loss="cross_entropy"), config, None).hidden_weight == 0

    def test_a_teacher_of_another_size_is_not_followed_inside(self) -> None:
        student = tiny_llama_config()
        for change in ({"num_hidden_layers": 3}, {"hidden_size": 64}):
            assert derived(Train(), student, tiny_llama_config(**change)).hidden_weight == 0
