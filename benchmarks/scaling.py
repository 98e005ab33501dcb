"""Uptraining speed with one and with several processes, on a random model of Llama 3.2 1B's shape; needs no network.

usage: scaling.py FOLDER [--processes 1 2] [--steps 40] [--set train.micro_batch_size=8 ...]
       scaling.py FOLDER --small --set device=cpu      # a dry run in a minute

Runs the command line as a user would (`torchrun -m cla_convert.cli uptrain`), cross-entropy on random tokens, sequences
of 2048, 131072 tokens a step. Prints tokens/s from step 10 on, the scaling efficiency, and how far the losses of the
first 20 steps lie apart.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, vocab_size=1024, max_position_embeddings=512, tie_word_embeddings=True)  # fmt: skip
LLAMA_1B = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                num_key_value_heads=8, head_dim=64, vocab_size=128256, max_position_embeddings=8192,
                tie_word_embeddings=True, rms_norm_eps=1e-5)  # fmt: skip
COMPARED, WARM_UP = 20, 10


def make_inputs(folder: Path, shape: dict[str, Any]) -> None:
    """source/ (random weights, a tokenizer of numbers), converted/ and text.jsonl (random numbers)."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from cla_convert.conversion.convert import convert
    from cla_convert.conversion.plan import make_plan
    from cla_convert.models.checkpoint import Checkpoint

    vocabulary = shape["vocab_size"]
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=0, eos_token_id=1)).bfloat16().save_pretrained(folder / "source")
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="0", eos_token="1")
    tokenizer.save_pretrained(folder / "source")
    checkpoint = Checkpoint.open(folder / "source")
    convert(make_plan(checkpoint, sharing="cla2-keep-ends", init="first"), checkpoint, folder / "converted")
    rng = random.Random(0)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(500):
            file.write(json.dumps({"text": " ".join(map(str, rng.choices(range(2, vocabulary), k=2000)))}) + "\n")


def uptrain(folder: Path, processes: int, settings: dict[str, Any], more: list[str]) -> list[dict[str, Any]]:
    """Run it; the rows of metrics.jsonl that belong to steps."""
    out = folder / f"out{processes}"
    for left in (out, out.with_name(f"{out.name}.state")):
        shutil.rmtree(left, ignore_errors=True)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    values = [f"train.{name}={value}" for name, value in settings.items()]
    values += [f"data.sources=[{{path: {folder / 'text.jsonl'}}}]", *more]
    command = [sys.executable, *launcher, "-m", "cla_convert.cli", "uptrain", folder / "converted", out, "--teacher",
               folder / "source", *(word for value in values for word in ("--set", value))]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    lines = (out.with_name(f"{out.name}.state") / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def speed(rows: list[dict[str, Any]]) -> float:
    """Tokens per second after the warm-up."""
    first, last = rows[WARM_UP - 1], rows[-1]
    return (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    folder, length, batch = options.folder.absolute(), 128 if options.small else 2048, 8 if options.small else 64
    if not (folder / "text.jsonl").exists():
        make_inputs(folder, SMALL if options.small else LLAMA_1B)
    settings = {
        "loss": "cross_entropy", "tokens": options.steps * batch * length, "batch_tokens": batch * length,
        "sequence_length": length, "micro_batch_size": 8 if not options.small else 2, "validation_tokens": length,
        "validate_every": 0, "checkpoint_every": 0, "learning_rate": 1e-4,
    }  # fmt: skip
    runs = {processes: uptrain(folder, processes, settings, options.set) for processes in options.processes}
    base, *others = options.processes
    print(f"{base} process: {speed(runs[base]):.0f} tokens/s")
    for n in others:
        gain = speed(runs[n]) / speed(runs[base])
        pairs = zip(runs[base][:COMPARED], runs[n][:COMPARED], strict=True)
        apart = max(abs(one["loss"] - other["loss"]) / one["loss"] for one, other in pairs)
        print(f"{n} processes: {speed(runs[n]):.0f} tokens/s, {gain:.2f} x ({gain * base / n:.0%} of ideal)")
        print(f"losses of the first {COMPARED} steps: at most {apart:.1e} apart, relative to their size")


if __name__ == "__main__":
    main()
