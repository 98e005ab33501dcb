"""Time and peak memory of a conversion through the command line, against the size of the model and against `cp -r`.

usage: streaming_memory.py FOLDER --shape 7b                    --init mean three times, in turns with cp -r
       streaming_memory.py FOLDER --shape 70b-thin --runs 5
       streaming_memory.py FOLDER --shape 7b --init calibrated --runs 1 --set convert.calibration.tokens=1024 ...

Makes a random checkpoint FOLDER/SHAPE once (7b: 14.5 GB) and needs as much again for the output. In every run the page
cache is cleared of the source first (fadvise), and the clock stops when the copy is on the disk: `cp -r` plus an fsync
of every file it wrote, against `cla-convert convert`, which syncs before it publishes. `cp -r` alone is printed too.
Memory is sampled from /proc while the program runs: `peak RSS` is the kernel's high-water mark, which counts pages of
mapped files (libraries, spilled activations); `anonymous` is without them.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MIB = 2**20
SHAPES: dict[str, tuple[dict[str, Any], int]] = {  # config.json, largest shard
    "2b": (dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=32,
                num_key_value_heads=4, vocab_size=32000), 200_000_000),
    "7b": (dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=32000), 5_000_000_000),
    "70b-thin": (dict(hidden_size=1024, intermediate_size=3584, num_hidden_layers=80, num_attention_heads=64,
                      num_key_value_heads=8, vocab_size=128256), 180_000_000),
    "tiny": (dict(hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
                  num_key_value_heads=2, vocab_size=1024), 300_000),
}  # fmt: skip


def make_source(folder: Path, shape: dict[str, Any], shard_size: int, device: str = "cpu") -> None:
    """A random bfloat16 Llama, written shard by shard, and a tokenizer and text of numbers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from cla_convert.models.writer import ShardWriter, infos_of

    folder.mkdir(parents=True)
    config = LlamaConfig(**shape, bos_token_id=0, eos_token_id=1, max_position_embeddings=8192, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    writer = ShardWriter(folder, infos_of(state), shard_size)
    for name, shape_only in state.items():
        tensor = torch.empty(shape_only.shape, dtype=torch.bfloat16, device=device)
        writer.add(name, tensor.fill_(1) if "norm" in name else tensor.normal_(std=0.02))
    writer.finish()
    words = Tokenizer(models.WordLevel({str(i): i for i in range(shape["vocab_size"])}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="0", eos_token="1")
    tokenizer.save_pretrained(folder)
    numbers = torch.randint(2, shape["vocab_size"], (100, 2000), generator=torch.Generator().manual_seed(0))
    text = "".join(json.dumps({"text": " ".join(map(str, row))}) + "\n" for row in numbers.tolist())
    (folder.parent / f"{folder.name}.jsonl").write_text(text)


def forget(folder: Path) -> None:
    """Sync, and drop the folder's pages from the page cache, so that every run reads it from the disk."""
    os.sync()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cpu_seconds() -> float:
    """Of all processes that have ended: what a busy machine does not stretch."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def copied(source: Path, out: Path) -> tuple[float, float]:
    """Seconds of `cp -r`, and with an fsync of what it wrote."""
    forget(source)
    started = time.monotonic()
    subprocess.run(["cp", "-r", source, out], check=True)
    alone = time.monotonic() - started
    for path in [*out.iterdir(), out]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.monotonic() - started
    shutil.rmtree(out)
    return alone, seconds


def converted(source: Path, out: Path, more: list[str]) -> tuple[float, dict[str, int]]:
    """Seconds of the command line, start to exit, and the peaks of its memory in bytes."""
    forget(source)
    command = [sys.executable, "-m", "cla_convert.cli", "convert", str(source), str(out), "--json", *more]
    peaks = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                continue
            now = dict(line.split(":", 1) for line in lines)
            peaks = {name: max(peak, int(now.get(name, "0").split()[0]) * 1024) for name, peak in peaks.items()}
            time.sleep(0.01)
    seconds = time.monotonic() - started
    if process.returncode:
        sys.exit(process.returncode)
    shutil.rmtree(out)
    return seconds, peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="2b")
    parser.add_argument("--layers", type=int, help="in place of the shape's own")
    parser.add_argument("--init", default="mean")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-cp", action="store_true", help="measure the conversion only")
    parser.add_argument("--set", action="append", default=[], help="passed on to convert")
    options = parser.parse_args()
    shape, shard_size = SHAPES[options.shape]
    shape |= {"num_hidden_layers": options.layers} if options.layers else {}
    source, out = options.folder.absolute() / options.shape, options.folder.absolute() / "out"
    if not source.exists():
        make_source(source, shape, shard_size)
    more = ["--init", options.init, "--max-shard-size", str(shard_size)]
    if options.init == "calibrated":
        more += ["--set", f"data.sources=[{{path: {source}.jsonl}}]", "--set", "device=cpu"]
    more += [word for value in options.set for word in ("--set", value)]
    copies, conversions, peaks = [], [], []
    for _ in range(options.runs):
        used = cpu_seconds()
        if not options.no_cp:
            copies.append(copied(source, out))
            alone, synced = copies[-1]
            print(f"cp -r {alone:.1f} s, synced {synced:.1f} s, {cpu_seconds() - used:.1f} s of CPU", flush=True)
        used = cpu_seconds()
        seconds, peak = converted(source, out, more)
        conversions.append(seconds)
        peaks.append(peak)
        memory = ", ".join(f"{name} {size / MIB:.0f} MiB" for name, size in peak.items())
        print(f"convert {seconds:.1f} s, {cpu_seconds() - used:.1f} s of CPU, {memory}", flush=True)
    shards = [file.stat().st_size for file in source.glob("*.safetensors")]
    print(f"model {sum(shards) / MIB:.0f} MiB in {len(shards)} shards of up to {max(shards) / MIB:.0f} MiB")
    print(f"convert --init {options.init}: median {statistics.median(conversions):.1f} s, "
          f"peak RSS {max(p['VmHWM'] for p in peaks) / MIB:.0f} MiB, "
          f"anonymous {max(p['RssAnon'] for p in peaks) / MIB:.0f} MiB")  # fmt: skip
    if copies:
        alone, synced = (statistics.median(times) for times in zip(*copies, strict=True))
        taken = statistics.median(conversions)
        print(f"cp -r: median {alone:.1f} s, synced {synced:.1f} s; "
              f"convert takes {taken / synced:.2f} x cp -r with sync, {taken / alone:.2f} x cp -r alone")  # fmt: skip


if __name__ == "__main__":
    main()
