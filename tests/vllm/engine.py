"""vLLM's engine in a process of its own: an engine takes over threads, memory and signal handlers of its process, and a
second one after it would not start from the same state.

Importing vLLM takes longer than serving a tiny model, so processes are forked from one that has imported it, and
nothing of ours. A job that changes the environment starts from nothing: `python -m tests.vllm.engine JOB.json
RESULT.json`. It names a model, the engine's arguments and rounds of prompts (token ids).
"""

import gc
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "2",
}  # fmt: skip
GIB = 2**30
"""Bytes of KV cache, unless a test says something else."""
DEFAULTS = {"dtype": "float32", "enforce_eager": True, "seed": 0, "disable_log_stats": True,
            "kv_cache_memory_bytes": GIB}  # fmt: skip
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "__main__",
        "vllm.entrypoints.llm",
        "vllm.v1.engine.llm_engine",
        "vllm.v1.worker.cpu_worker",
        "vllm.model_executor.model_loader",
        "vllm.model_executor.models.transformers",
        "vllm.lora.model_manager",
        "compressed_tensors",
        "tests.vllm.engine",
    ]
)


def run(
    folder: Path, model: Path, rounds: list[list[list[int]]], new: int = 16, adapter: Path | None = None, **engine: Any
) -> dict[str, Any]:
    """What `main` found, with the log; `error` instead where the engine did not start."""
    job, result, log = folder / "job.json", folder / "result.json", folder / "log"
    result.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    environment, threads = engine.pop("environment", {}), engine.pop("threads", 2)
    what = {"model": str(model), "rounds": rounds, "new": new, "threads": threads, "engine": {**DEFAULTS, **engine}}
    what["adapter"] = str(adapter) if adapter else None
    job.write_text(json.dumps(what))
    (_start_anew if environment else _fork)([str(job), str(result)], log, environment)
    said = log.read_text()
    return (json.loads(result.read_text()) if result.exists() else {"error": said}) | {"log": said}


def _start_anew(files: list[str], log: Path, environment: dict[str, str]) -> None:
    with log.open("w") as stream:
        subprocess.run(
            [sys.executable, "-m", "tests.vllm.engine", *files], stdout=stream, stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[2], env=os.environ | ENVIRONMENT | environment,
        )  # fmt: skip


def _fork(files: list[str], log: Path, environment: dict[str, str]) -> None:
    os.environ |= ENVIRONMENT  # the process to fork from takes it over when it is started
    process = FORKED.Process(target=_forked, args=(files, log))
    process.start()
    process.join()


def _forked(files: list[str], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    gc.freeze()  # vLLM collects garbage while it starts, and would go through all that was imported
    main(*files)


def main(job_file: str, result_file: str) -> None:
    """Answer the rounds of prompts one after the other; in one of them, all prompts at once."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's insides are looked at
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["threads"])
    llm: Any = LLM(job["model"], **job["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True, logprobs=0)
    adapter = LoRARequest("adapter", 1, job["adapter"]) if job["adapter"] else None
    rounds = []
    for prompts in job["rounds"]:
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = llm.generate(asked, sampling, use_tqdm=False, lora_request=adapter)
        rounds.append([
            {
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [next(iter(step.values())).logprob for step in output.outputs[0].logprobs],
                "cached": output.num_cached_tokens,
            }
            for output in outputs
        ])  # fmt: skip
    config = llm.llm_engine.vllm_config
    core = llm.llm_engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    context = config.compilation_config.static_forward_context
    attention = {name: layer for name, layer in context.items() if hasattr(layer, "kv_cache")}  # experts are in it, too
    found = {
        "rounds": rounds,
        "blocks": config.cache_config.num_gpu_blocks,
        "block": config.cache_config.block_size,
        "tokens": config.cache_config.kv_cache_size_tokens,
        "free": pool.get_num_free_blocks(),
        "groups": [[len(group.layer_names), type(group.kv_cache_spec).__name__]
                   for group in core.scheduler.kv_cache_config.kv_cache_groups],
        "buffers": len({_address(layer) for layer in attention.values()}),
        "layers": len(attention),
        "bytes": sum(tensor.size for tensor in core.scheduler.kv_cache_config.kv_cache_tensors),
    }  # fmt: skip
    Path(result_file).write_text(json.dumps(found))


def _address(layer: Any) -> int:
    cache = layer.kv_cache
    return (cache[0] if isinstance(cache, list) else cache).data_ptr()


if __name__ == "__main__":
    main(*sys.argv[1:])
