"""The model as lm-eval sees it through vLLM: lm-eval's own `vllm` model class, with our progress bar.

Import this module only where vLLM is installed, and through `backend.load_backend`, which sets its environment.

Every point is run through vLLM's Transformers backend: the source model by transformers' modelling code, a CLA model by
the plugin (serving/), exactly as it is served. vLLM's own implementation of the source's family would round differently
in bfloat16, and that difference would pass for a cost of sharing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.vllm_causallms import VLLM
from transformers import AutoConfig

from ..environment import available_memory
from ..errors import InputError, UsageError
from ..models.checkpoint import Checkpoint
from ..serving.plugin import register
from .context import LOGITS, fed_tokens
from .metered import Metered

REQUESTS = 1024
"""Handed to vLLM at a time; it forms batches by itself."""
SPARE = 2
"""Positions beyond what is fed, for the last token of an answer and the one token that vLLM must generate."""
ENGINE = {"model_impl": "transformers", "enforce_eager": True, "enable_prefix_caching": False}
"""Nothing is decoded, so compiling and capturing graphs would only take time; `eval.vllm` may overrule all of it."""

Base: Any = VLLM  # its registration decorator hides the class from type checkers


class VllmLM(Metered, Base):
    """lm-eval's VLLM that reports tokens as it goes and can be closed."""

    def close(self) -> None:
        """End vLLM's process, so that the next model finds the memory free."""
        self.model.llm_engine.engine_core.shutdown()

    def _model_generate(self, requests: Any, generate: bool = False, sampling_params: Any = None) -> Any:
        try:
            outputs = super()._model_generate(requests, generate=generate, sampling_params=sampling_params)
        except Exception as error:
            # Whatever a third party's engine raises, and mostly in another process (CLA_DEBUG shows all).
            raise _failed("vLLM stopped while scoring", error) from error
        self.on_tokens(sum(map(len, requests)))
        return outputs


def load_vllm(model_dir: Path, *, device: str, dtype: str, max_length: int, seed: int, options: dict[str, Any]) -> Any:
    """Start vLLM on a folder (plain transformers or CLA).

    Args:
        model_dir: the folder. Code in it is never run: a CLA model gets this package's own.
        device: cpu or cuda; which of them vLLM serves is fixed by how it was built.
        dtype: float32, bfloat16, ...
        max_length: longest context; two tokens less than the model was built for are possible.
        seed: of vLLM's sampling.
        options: further arguments of vLLM's engine (`eval.vllm`).

    Raises:
        UsageError: vLLM is built for another device.
        InputError: vLLM cannot run this model.
    """
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    if current_platform.device_type != device:
        raise UsageError(
            f"This vLLM runs on {current_platform.device_type}, and the device is {device}",
            fix=f"Use --set device={current_platform.device_type}, or eval.backend=hf.",
        )
    if around := Checkpoint.open(model_dir).around:
        raise InputError(
            f"vLLM does not serve {around.whole.name} with Cross-Layer Attention",
            why=f"{model_dir} is the whole model, and the plugin knows language models.",
            fix="Convert with --text-only (source.text_only), or evaluate with --backend hf.",
        )
    register()
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    built_for = getattr(config.get_text_config(), "max_position_embeddings", None) or max_length + SPARE
    context = min(fed_tokens(config, max_length), built_for - SPARE)
    # Log-probabilities of a prompt take all of its logits, which vLLM does not count when it measures what is free.
    together = max(context + SPARE, LOGITS // config.get_text_config().vocab_size)
    arguments = {
        **ENGINE,
        "gpu_memory_utilization": _share(device, options),
        "max_num_batched_tokens": together,
        **options,
    }
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what this process measured before
    try:
        return VllmLM(
            context=context, pretrained=str(model_dir), dtype=dtype, trust_remote_code=False, batch_size=REQUESTS,
            max_model_len=context + SPARE, seed=seed, **arguments,
        )  # fmt: skip
    except Exception as error:
        raise _failed(f"vLLM cannot run the model in {model_dir}", error) from error


def _share(device: str, options: Mapping[str, Any]) -> float:
    """Of all memory, what a process of vLLM may take. It refuses to start where so much is not free.

    That is seldom so on a CPU, whose memory all processes share.
    """
    if device != "cpu":
        return 0.7
    import psutil

    processes = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
    return round(0.7 * available_memory() / psutil.virtual_memory().total / processes, 3)


def _failed(what: str, error: Exception) -> InputError:
    reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:300]}"
    fix = "Read vLLM's messages above; change its settings (--set eval.vllm={...}), or use --backend hf."
    return InputError(what, why=reason, fix=fix)
