"""What scores the tasks: transformers (`hf`) or vLLM (`vllm`), each through lm-eval's own model class.

All points of a run are scored by the same one, and it is part of the specification. Perplexity of texts, agreement and
the KV cache are always measured with transformers: they need logits and cache tensors, which vLLM does not hand out.
"""

import os
from pathlib import Path
from typing import Any

from ..environment import world_size
from ..errors import InputError, UsageError
from ..recipe import Evaluate
from ..serving.versions import check_vllm
from .batch import out_of_memory


def check_backend(spec: Evaluate, device: str) -> None:
    """Refuse what cannot work, without importing vLLM.

    Raises:
        InputError: vLLM is not installed, or of a version that cannot serve CLA models.
        UsageError: vLLM under torchrun, or on a device that it would not pick.
    """
    if spec.backend == "hf":
        return
    check_vllm()
    if world_size() > 1:
        raise UsageError(
            "vLLM uses several GPUs by itself",
            fix="Start without torchrun; --set 'eval.vllm={tensor_parallel_size: 2}' divides a model.",
        )
    if device not in ("cpu", "cuda"):
        raise UsageError(
            f"vLLM cannot be given the device {device!r}",
            fix="Use --set device=cuda (CUDA_VISIBLE_DEVICES chooses which), or --backend hf.",
        )


_PLACES = {"tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend", "gpu_memory_utilization"}
"""Arguments of vLLM's engine that say where a model lies, not what it computes."""


def engine_settings(spec: Evaluate) -> dict[str, Any]:
    """What of `eval.vllm` belongs to the specification: all but where the model lies."""
    return {name: value for name, value in spec.vllm.items() if name not in _PLACES}


def load_backend(model_dir: Path, spec: Evaluate, common: dict[str, Any], device: str, accelerator: Any) -> Any:
    """The loaded model as an lm-eval model with the extras of `metered.Metered`.

    Raises:
        InputError, UsageError: as `load_vllm`, or vLLM cannot be imported.
    """
    from . import model

    settings = {"device": device, "dtype": common["dtype"], "max_length": common["max_length"]}
    if spec.backend == "hf":
        with out_of_memory():
            return model.load(
                model_dir, **settings, batch_size=common["batch_size"], logits=common.get("logits_at_once", 0),
                accelerator=accelerator,
            )  # fmt: skip
    _hush_vllm()
    try:
        from .vllm_model import load_vllm
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError("vLLM is installed but cannot be imported", why=str(error).splitlines()[0]) from error
    return load_vllm(model_dir, **settings, seed=common["seed"], options=spec.vllm)


def _hush_vllm() -> None:
    """Before vLLM is imported: log to stderr, where data does not go, and errors only; report no usage."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
