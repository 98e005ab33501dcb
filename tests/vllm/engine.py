"""vLLM's engine in a process of its own: `python -m tests.vllm.engine JOB.json RESULT.json`.

An engine takes over threads, memory and signal handlers of its process, and a second one after it would not start from
the same state. The job names a model, the engine's arguments and rounds of prompts (token ids).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "2",
}  # fmt: skip
DEFAULTS = {"dtype": "float32", "enforce_eager": True, "seed": 0, "disable_log_stats": True}


def run(folder: Path, model: Path, rounds: list[list[list[int]]], new: int = 16, **engine: Any) -> dict[str, Any]:
    """What `main` found, with the log; `error` instead where the engine did not start."""
    job, result = folder / "job.json", folder / "result.json"
    result.unlink(missing_ok=True)
    environment = engine.pop("environment", {})
    job.write_text(json.dumps({"model": str(model), "rounds": rounds, "new": new, "engine": {**DEFAULTS, **engine}}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.engine", job, result], capture_output=True, text=True,
        cwd=Path(__file__).parents[2], env=os.environ | ENVIRONMENT | environment,
    )  # fmt: skip
    log = done.stdout + done.stderr
    return (json.loads(result.read_text()) if result.exists() else {"error": log}) | {"log": log}


def main(job_file: str, result_file: str) -> None:
    """Answer the rounds of prompts one after the other; in one of them, all prompts at once."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's insides are looked at
    from vllm import LLM, SamplingParams

    job = json.loads(Path(job_file).read_text())
    llm: Any = LLM(job["model"], **job["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True, logprobs=0)
    rounds = []
    for prompts in job["rounds"]:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
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
