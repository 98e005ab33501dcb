"""Source against converted model in vLLM, in one run: what fits into the memory, and how fast it is served.

    python benchmarks/serving.py SOURCE CONVERTED --equal 4GB --out serving.json
    python benchmarks/serving.py --shape 8b --sharing cla2 --equal 8GB      # random weights: speed and memory alike

Each engine runs in a process of its own. Twice for each model: with all the memory that vLLM takes (`full`), and with
`--equal` bytes of KV cache (`equal`), at each context:

    capacity    tokens of KV cache, as vLLM allocated it
    batch       sequences of prompt + new tokens that fit at once, by vLLM's own blocks
    TTFT        seconds to the first token of a lone request (median of three, no prefix cache)
    served      tokens answered per second, prompts included in the time, by `--rounds` times as many requests as fit
                at once: what the users of a server get
    decode      the same without the time that the prompts alone take, measured by answers of one token

Needs vLLM and cla-convert; on a CPU, VLLM_CPU_KVCACHE_SPACE (GiB) is the full memory.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shapes import SHAPES, write_pair

from cla_convert.serving.versions import check_vllm

UNITS = {"GB": 10**9, "MB": 10**6, "GiB": 2**30, "MiB": 2**20}


def main() -> None:
    """Measure both models and print a table."""
    options = parse()
    if options.shape:
        options.source, options.converted = write_pair(options.shape, options.sharing, Path(tempfile.mkdtemp()))
    results = []
    for memory in ["full", *(["equal"] if options.equal else [])]:
        for name, model in (("source", options.source), ("converted", options.converted)):
            for context in map(int, options.contexts.split(",")):
                results.append(in_a_process(options, name, model, context, memory))
                print(row(results[-1]), flush=True)
                if options.out:
                    options.out.write_text(json.dumps(results, indent=1))
    print("\n" + "\n".join(ratios(results)))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", nargs="?")
    parser.add_argument("converted", nargs="?")
    parser.add_argument("--shape", choices=SHAPES, help="instead of models: this shape, with random weights")
    parser.add_argument("--sharing", default="cla2-keep-ends", help="of --shape")
    parser.add_argument("--contexts", default="2048,8192", help="tokens of prompt and answer together")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--equal", type=size, help="bytes of KV cache for the comparison at equal memory")
    parser.add_argument("--utilization", type=float, default=0.9, help="share of the GPU that vLLM may take")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-batch", type=int, default=4096, help="sequences at once at most")
    parser.add_argument("--rounds", type=int, default=2, help="batches that are served for the throughput")
    parser.add_argument("--eager", action="store_true", help="neither compile nor capture graphs")
    parser.add_argument("--stretch", action="store_true", help="allow contexts beyond what the model was built for")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def size(text: str) -> int:
    """`4GB` -> 4_000_000_000."""
    unit = next(unit for unit in UNITS if text.endswith(unit))
    return int(float(text.removesuffix(unit)) * UNITS[unit])


def in_a_process(options: argparse.Namespace, name: str, model: str, context: int, memory: str) -> dict[str, Any]:
    """Start an engine elsewhere, so that it finds the GPU empty, and return what it measured."""
    with tempfile.TemporaryDirectory() as scratch:
        job = Path(scratch) / "job.json"
        settings = {key: value for key, value in vars(options).items() if key not in ("out", "measure")}
        job.write_text(
            json.dumps(
                settings | {"name": name, "model": str(model), "context": context, "memory": memory}, default=str
            )
        )
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        if options.stretch:
            environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        done = subprocess.run(
            [sys.executable, __file__, "-", "-", "--measure", job], env=os.environ | environment, stdout=subprocess.PIPE
        )
        if done.returncode:
            sys.exit(f"{name} at {context} tokens failed")
        return json.loads(done.stdout.splitlines()[-1])


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One engine at one context."""
    if job["memory"] == "equal":
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # where it is set, vLLM takes it instead of what it is told
    from vllm import LLM

    engine: dict[str, Any] = {
        "model": job["model"], "dtype": job["dtype"], "max_model_len": job["context"], "enforce_eager": job["eager"],
        "max_num_seqs": job["max_batch"], "enable_prefix_caching": False, "seed": 0, "disable_log_stats": True,
    }  # fmt: skip
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        engine["gpu_memory_utilization"] = job["utilization"]
    if job["memory"] == "equal":
        engine["kv_cache_memory_bytes"] = job["equal"]
    if job["shape"]:
        engine |= {"load_format": "dummy", "skip_tokenizer_init": True}
    started = time.perf_counter()
    llm = LLM(**engine, model_impl="transformers")
    startup = time.perf_counter() - started
    cache = llm.llm_engine.vllm_config.cache_config
    capacity = capacity_of(llm)
    batch = max(1, min(job["max_batch"], capacity // job["context"]))
    prompt = job["context"] - job["new"]
    ttft = [seconds(llm, prompt, 1, 1, seed) for seed in range(4)][1:]  # the first one warms up
    requests = job["rounds"] * batch
    prefill = seconds(llm, prompt, 1, requests, 10)
    both = seconds(llm, prompt, job["new"], requests, 11)
    return {
        "name": job["name"], "model": job["model"], "memory": job["memory"], "context": job["context"],
        "new": job["new"], "vllm": check_vllm(), "device": device(), "startup_seconds": startup,
        "kv_blocks": cache.num_gpu_blocks, "kv_tokens": capacity, "batch": batch, "requests": requests,
        "ttft_seconds": statistics.median(ttft), "ttft_runs": ttft,
        "prefill_tokens_per_second": requests * prompt / prefill,
        # Where a busy machine took longer for the prompts alone, nothing is said.
        "decode_tokens_per_second": requests * (job["new"] - 1) / (both - prefill) if both > prefill else math.nan,
        "served_tokens_per_second": requests * job["new"] / both,
    }  # fmt: skip


def capacity_of(llm: Any) -> int:
    """Tokens that the KV cache holds, in sequences of the longest context."""
    config = llm.llm_engine.vllm_config
    if tokens := getattr(config.cache_config, "kv_cache_size_tokens", None):
        return tokens
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    core = llm.llm_engine.engine_core.engine_core
    together = get_max_concurrency_for_kv_cache_config(config, core.scheduler.kv_cache_config)
    return int(together * config.model_config.max_model_len)


def seconds(llm: Any, prompt: int, new: int, requests: int, seed: int) -> float:
    """Time to answer so many requests of random tokens that all arrive at once."""
    import random

    from vllm import SamplingParams

    rng = random.Random(seed)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    ids = [[rng.randrange(10, vocabulary - 10) for _ in range(prompt)] for _ in range(requests)]
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": one} for one in ids], sampling, use_tqdm=False)
    elapsed = time.perf_counter() - started
    assert all(len(output.outputs[0].token_ids) == new for output in outputs)
    return elapsed


def device() -> str:
    """The GPU's name, or cpu."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def row(found: dict[str, Any]) -> str:
    """One measurement, in a line."""
    return (
        f"{found['memory']:5} {found['context']:6} {found['name']:9} {found['kv_tokens']:9,} KV tokens, "
        f"batch {found['batch']:5}, TTFT {found['ttft_seconds'] * 1000:7.1f} ms, decode "
        f"{found['decode_tokens_per_second']:9,.0f} tok/s, served {found['served_tokens_per_second']:9,.0f} tok/s"
    )


def ratios(results: list[dict[str, Any]]) -> list[str]:
    """Converted over source, for every memory and context."""
    by = {(found["memory"], found["context"], found["name"]): found for found in results}
    lines = []
    for memory, context, name in by:
        if name != "converted":
            continue
        ours, theirs = by[memory, context, "converted"], by[memory, context, "source"]
        words = [
            f"{label} {ours[key] / theirs[key]:.3f}x"
            for label, key in (("KV tokens", "kv_tokens"), ("batch", "batch"), ("TTFT", "ttft_seconds"),
                               ("decode", "decode_tokens_per_second"), ("served", "served_tokens_per_second"))
        ]  # fmt: skip
        lines.append(f"{memory:5} {context:6}  {', '.join(words)}")
    return lines


if __name__ == "__main__":
    if "--measure" in sys.argv:
        print(json.dumps(measure(json.loads(Path(sys.argv[sys.argv.index("--measure") + 1]).read_text()))))
    else:
        main()
