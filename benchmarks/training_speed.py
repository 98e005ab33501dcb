"""Tokens per second, MFU and peak memory of uptraining, beside the stock transformers Trainer: same model, same batch.

    python benchmarks/training_speed.py --model smollm2-135m/ --out speed.json
    python benchmarks/training_speed.py --llama-1b --sequence 2048 --micro 8 --only cross_entropy --out speed-1b.json
    python benchmarks/training_speed.py --model smollm2-135m/ --document-masking --only documents --out documents.json
    python benchmarks/training_speed.py --tiny --device cpu --sequence 64 --batch-tokens 512 --micro 4 --steps 2

Works offline, on random tokens. Every variant does its steps after one or two for warming up and compiling; one that
fails is reported and does not stop the others; what would begin after --seconds is left out.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from cla_convert.console import say
from cla_convert.conversion.convert import convert
from cla_convert.conversion.plan import make_plan
from cla_convert.environment import hardware, versions
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import load_model
from cla_convert.recipe import Recipe
from cla_convert.recipe_file import validate
from cla_convert.training.data import TokenStore
from cla_convert.training.flops import peak_flops, training_flops
from cla_convert.training.state import Position, TrainingStates
from cla_convert.training.step import take_step
from cla_convert.training.trainer import set_up

LLAMA_1B = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
    head_dim=64, vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=True, dtype="bfloat16",
)  # fmt: skip
TINY = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip


@dataclass
class Setting:
    """What all variants have in common."""

    source: Path
    student: Path
    device: str
    sequence: int
    batch_tokens: int
    micro: int
    steps: int
    store: TokenStore
    folder: Path


@dataclass
class Figures:
    """One row of the table."""

    name: str
    tokens_per_second: float = 0.0
    mfu: float | None = None
    peak_gib: float = 0.0
    first_step_seconds: float = 0.0
    loss: float = 0.0
    error: str = ""
    kernels: list[tuple[str, float, int]] = field(default_factory=list)
    """Name, milliseconds a step and calls a step of the slowest kernels, where profiled."""


def main() -> int:
    options = parse()
    deadline = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(options, Path(folder))
        rows = list(measure_all(variants(setting, options), options.only, deadline))
    result = {
        "options": vars(options),
        "hardware": hardware(),
        "versions": versions(),
        "rows": [asdict(r) for r in rows],
    }
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=2, default=str))
    print_table(rows, options)
    return 0 if all(not row.error for row in rows) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="folder of a source model")
    model.add_argument("--llama-1b", action="store_true", help="random weights in the shape of Llama-3.2-1B")
    model.add_argument("--tiny", action="store_true", help="a tiny random model, to try the script")
    parser.add_argument("--sharing", default="cla2-keep-ends")
    parser.add_argument("--tokens", help=".npy of token ids; default: random ones")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--micro", type=int, default=32, help="sequences in a pass")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of a variant")
    parser.add_argument("--only", default="", help="comma-separated parts of the names of variants")
    parser.add_argument("--document-masking", action="store_true", help="also with the documents of a row kept apart")
    parser.add_argument("--document-length", type=int, default=700, help="mean length of its made-up documents")
    parser.add_argument("--profile", action="store_true", help="list the slowest kernels of our compiled variants")
    parser.add_argument("--seconds", type=float, default=330, help="begin no variant after so long")
    parser.add_argument("--out", help="JSON file for the results")
    return parser.parse_args()


def prepare(options: argparse.Namespace, folder: Path) -> Setting:
    """Build or find the source model, convert it, and make up the tokens."""
    source = options.model
    if source is None:
        source = folder / "source"
        torch.manual_seed(0)
        with torch.device(options.device):
            model = LlamaForCausalLM(LlamaConfig(**(LLAMA_1B if options.llama_1b else TINY)))
        model.to(torch.bfloat16 if options.llama_1b else torch.float32).save_pretrained(source)
        del model
    checkpoint = Checkpoint.open(source)
    convert(make_plan(checkpoint, sharing=options.sharing, init="first"), checkpoint, folder / "student")
    vocabulary = checkpoint.config["vocab_size"]
    random = np.random.default_rng(0).integers(0, vocabulary, size=max(4_000_000, 2 * options.batch_tokens))
    tokens = np.load(options.tokens, mmap_mode="r") if options.tokens else random.astype(np.uint32)
    lengths = np.random.default_rng(1).geometric(1 / options.document_length, size=len(tokens))
    starts = np.cumsum(lengths) - lengths
    store = TokenStore(tokens, tokens[: options.sequence + 1], "benchmark", {}, starts[starts < len(tokens)])
    return Setting(
        source, folder / "student", options.device, options.sequence, options.batch_tokens, options.micro,
        options.steps, store, folder,
    )  # fmt: skip


def variants(setting: Setting, options: argparse.Namespace) -> dict[str, Callable[[], Figures]]:
    """What is measured, the most interesting first. Liger comes last: it patches transformers for good."""

    def loop(cudnn: bool = False, **train: Any) -> Callable[[], Figures]:
        return lambda: ours(setting, train, profile=options.profile and train["compile"], cudnn=cudnn)

    double = 2 * setting.micro
    table = {
        "distill, compiled": loop(loss="distill", compile=True),
        "cross_entropy, compiled": loop(loss="cross_entropy", compile=True),
        "Trainer cross_entropy, compiled": lambda: stock(setting, compiled=True),
        "distill, compiled, cuDNN attention": loop(cudnn=True, loss="distill", compile=True),
        "Trainer cross_entropy": lambda: stock(setting, compiled=False),
        f"distill, compiled, micro {double}": loop(loss="distill", compile=True, micro_batch_size=double),
        "distill": loop(loss="distill", compile=False),
        "cross_entropy": loop(loss="cross_entropy", compile=False),
        "distill, compiled, attention only": loop(loss="distill", compile=True, parameters="attention"),
    }
    if options.document_masking:
        table |= {
            "distill, compiled, documents ignored": table["distill, compiled"],
            "distill, compiled, documents apart": loop(loss="distill", compile=True, document_masking=True),
            "distill, documents apart": loop(loss="distill", compile=False, document_masking=True),
        }
    if find_spec("liger_kernel"):
        table |= {
            "Trainer cross_entropy, Liger": lambda: stock(setting, compiled=False, liger=True),
            "Trainer cross_entropy, Liger, compiled": lambda: stock(setting, compiled=True, liger=True),
        }
    else:
        say("liger_kernel is not installed: the Trainer is measured without it")
    return table


def measure_all(table: dict[str, Callable[[], Figures]], only: str, deadline: float) -> Iterator[Figures]:
    """Run the variants one after another, whatever becomes of the others."""
    wanted = [word.strip() for word in only.split(",") if word.strip()]
    for name, measure in table.items():
        if wanted and not any(word in name for word in wanted):
            continue
        if time.monotonic() > deadline:
            yield Figures(name, error="left out: no time")
            continue
        say(f"--- {name}")
        clean_up()
        try:
            row = measure()
            row.name = name
        except Exception as error:  # the whole point: one that fails must not stop the others
            traceback.print_exc()
            row = Figures(name, error=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
        say(f"    {row.tokens_per_second:,.0f} tokens/s, first step {row.first_step_seconds:.1f} s {row.error}")
        yield row


def ours(setting: Setting, train: dict[str, Any], *, profile: bool, cudnn: bool) -> Figures:
    """Steps of `cla-convert uptrain`."""
    trainer = set_up(setting.student, setting.source, recipe(setting, train), setting.device, data=setting.store)
    checkpoints = TrainingStates(setting.folder / "checkpoints", {}, keep=1)
    position, row = Position(), {}
    clock = Clock(setting)

    def steps(count: int) -> None:
        nonlocal position, row
        for _ in range(count):
            position, row = take_step(trainer, position, checkpoints)

    with attention_kernel(cudnn):
        first = clock.time(lambda: steps(1))
        steps(1)
        seconds = clock.time(lambda: steps(setting.steps))
        kernels = slowest_kernels(lambda: steps(2), 2) if profile and setting.device.startswith("cuda") else []
    figures = clock.figures(seconds, first, trainer.flops_per_token)
    figures.loss, figures.kernels = row["loss"], kernels
    return figures


def stock(setting: Setting, *, compiled: bool, liger: bool = False) -> Figures:
    """Steps of transformers' Trainer with cross-entropy: bfloat16 autocast, fused AdamW."""
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model: Any = load_model(setting.student, dtype=torch.float32)
    model.config.use_cache = False
    clock = Clock(setting)
    watch = Watch(clock, warm=2, steps=setting.steps)
    rows = setting.store.train[: len(setting.store.train) // setting.sequence * setting.sequence]
    data = [{"input_ids": ids, "labels": ids} for ids in rows.reshape(-1, setting.sequence).astype(np.int64)]
    arguments = TrainingArguments(
        output_dir=str(setting.folder / "trainer"), max_steps=watch.warm + setting.steps,
        per_device_train_batch_size=setting.micro,
        gradient_accumulation_steps=setting.batch_tokens // setting.sequence // setting.micro,
        bf16=setting.device.startswith("cuda"), torch_compile=compiled, optim="adamw_torch_fused",
        learning_rate=1e-5, logging_steps=10_000, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=setting.device == "cpu", dataloader_num_workers=0 if setting.device == "cpu" else 2,
    )  # fmt: skip
    flops = training_flops(model, None, setting.sequence)
    outcome = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[watch]).train()
    figures = clock.figures(watch.seconds, watch.first, flops)
    figures.loss = outcome.training_loss
    return figures


class Watch(TrainerCallback):
    """Times the Trainer's steps: the first one, and those after `warm`."""

    def __init__(self, clock: "Clock", warm: int, steps: int) -> None:
        self.clock, self.warm, self.steps = clock, warm, steps
        self.start = self.first = self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (0, self.warm):
            self.start = self.clock.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.first = self.clock.now() - self.start
        if state.global_step == self.warm + self.steps:
            self.seconds = self.clock.now() - self.start


class Clock:
    """Wall-clock time with nothing left running on the device, and the figures that follow from it."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.cuda = setting, setting.device.startswith("cuda")

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, work: Callable[[], None]) -> float:
        start = self.now()
        work()
        return self.now() - start

    def figures(self, seconds: float, first: float, flops_per_token: float) -> Figures:
        rate = self.setting.steps * self.setting.batch_tokens / seconds
        peak = peak_flops(self.setting.device, torch.bfloat16)
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0
        return Figures("", rate, rate * flops_per_token / peak if peak else None, memory, first)


def recipe(setting: Setting, train: dict[str, Any]) -> Recipe:
    steps = setting.steps + 10
    shape = dict(
        tokens=steps * setting.batch_tokens, sequence_length=setting.sequence, batch_tokens=setting.batch_tokens,
        micro_batch_size=setting.micro, learning_rate=1e-5,
    )  # fmt: skip
    return validate({"train": shape | train})


@contextmanager
def attention_kernel(cudnn: bool) -> Iterator[None]:
    """Let attention prefer cuDNN's kernel to torch's choice."""
    if not cudnn:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


def slowest_kernels(work: Callable[[], None], steps: int) -> list[tuple[str, float, int]]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as record:
        work()
        torch.cuda.synchronize()
    kernels = sorted(record.key_averages(), key=lambda k: -k.self_device_time_total)[:40]
    return [(k.key[:150], k.self_device_time_total / 1e3 / steps, k.count // steps) for k in kernels]


def clean_up() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def print_table(rows: list[Figures], options: argparse.Namespace) -> None:
    for row in rows:
        for name, milliseconds, calls in row.kernels[:25]:
            print(f"{row.name:<28} {milliseconds:8.2f} ms {calls:5d}x  {name[:100]}")
    base = max((r.tokens_per_second for r in rows if r.name.startswith("Trainer")), default=0)
    print(f"\n{options.batch_tokens} tokens a step, sequence {options.sequence}, {options.micro} sequences a pass")
    print(f"{'':<40}{'tokens/s':>10}{'MFU':>8}{'peak GiB':>10}{'first step':>12}{'x Trainer':>11}")
    for row in rows:
        if row.error:
            print(f"{row.name:<40}{row.error}")
            continue
        mfu = "" if row.mfu is None else f"{row.mfu:.1%}"
        ratio = f"{row.tokens_per_second / base:.2f}" if base else ""
        print(
            f"{row.name:<40}{row.tokens_per_second:>10,.0f}{mfu:>8}{row.peak_gib:>10.1f}"
            f"{row.first_step_seconds:>10.1f} s{ratio:>11}"
        )


if __name__ == "__main__":
    sys.exit(main())
