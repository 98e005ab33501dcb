"""The classes that serve CLA models in vLLM: its Transformers backend, with consumers mapped to their owner's cache.

The modelling code is the one that ships with every output (this package's copy of it); vLLM replaces its linear layers
and its attention. Imported by vLLM when a CLA model is loaded, after `plugin.register` has named it.
"""

import logging
from typing import TYPE_CHECKING, Any

import torch
import vllm.model_executor.models.transformers as transformers_backend  # pyright: ignore[reportMissingImports]
from vllm.distributed.utils import get_pp_indices  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.transformers import (  # pyright: ignore[reportMissingImports]
    TransformersForCausalLM,
    TransformersMoEForCausalLM,
    base,
)

from ..errors import InputError
from ..models.classes import register
from ..models.families import FAMILIES
from .sharing import check_attends, check_stages, layer_of, owner_name
from .versions import check_vllm

if TYPE_CHECKING:
    from vllm.config import VllmConfig  # pyright: ignore[reportMissingImports]

check_vllm()
register()  # vLLM builds the model by AutoModel

logger = logging.getLogger("vllm.plugins.cla_convert")  # below vllm's own, which has a handler


class SharedCache:
    """What a class of vLLM's Transformers backend needs to serve a CLA model; stands before it among the bases."""

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        self._attention: dict[int, Any] = {}
        self._sharing_proven = False
        config = vllm_config.model_config.hf_config
        check_attends(config.kv_source_layers)
        sources: list[int] = config.kv_source_layers
        stages = vllm_config.parallel_config.pipeline_parallel_size
        starts = [get_pp_indices(len(sources), rank, stages)[0] for rank in range(stages)]
        check_stages(sources, [*starts, len(sources)])
        _check_settings(vllm_config, config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        if logits := getattr(self, "logits_processor", None):  # the last stage has one
            logits.scale /= getattr(config, "logits_scaling", 1.0)  # Granite's; vLLM reads logit_scale
            logits.soft_cap = getattr(config, "final_logit_softcapping", None)
        self._prove_mapping()

    def _get_attn_cls(self) -> Any:
        """From vLLM 0.28 on: what builds the attention of each layer."""
        return self._sharing(super()._get_attn_cls())  # type: ignore[misc]

    def create_attention_instances(self) -> dict[int, Any]:
        """Up to vLLM 0.27, which calls the class by its name in the module; 0.28 and 0.29 ask `_get_attn_cls`."""
        if hasattr(super(), "_get_attn_cls"):
            return super().create_attention_instances()  # type: ignore[misc]
        original = base.Attention
        base.Attention = self._sharing(original)
        try:
            return super().create_attention_instances()  # type: ignore[misc]
        finally:
            base.Attention = original

    def _sharing(self, attention: Any) -> Any:
        """`attention`, told whose cache a consumer reads."""
        sources = self.text_config.kv_source_layers  # type: ignore[attr-defined]

        def build(*, prefix: str, **settings: Any) -> Any:
            layer = layer_of(prefix)
            if sources[layer] != layer:
                settings["kv_sharing_target_layer_name"] = owner_name(prefix, layer, sources[layer])
            self._attention[layer] = attention(prefix=prefix, **settings)
            return self._attention[layer]

        return build

    def _prove_mapping(self) -> None:
        """At start-up: exactly the owners will get a KV cache. Raises InputError."""
        sources = self.text_config.kv_source_layers  # type: ignore[attr-defined]
        buffers = sorted(i for i, layer in self._attention.items() if layer.kv_sharing_target_layer_name is None)
        owners = sorted({sources[layer] for layer in self._attention})
        if buffers != owners:
            raise InputError(
                f"vLLM would keep KV caches for layers {buffers}, and the model's owners are {owners}",
                why="The cache would be larger than the model needs, or wrong.",
                fix="Use a version of vLLM that docs/serving.md lists, and report this.",
            )
        layers = len(self._attention)
        logger.info(
            "cla-convert: %d of %d layers keep keys and values, the others read theirs: the same memory holds %.2fx "
            "the tokens.", len(owners), layers, layers / len(owners),
        )  # fmt: skip

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; the first time that there is a cache, look whether it is the one that was asked for."""
        if not self._sharing_proven:
            self._prove_sharing()
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _prove_sharing(self) -> None:
        """Once the caches are allocated: a consumer's is its owner's. Raises InputError."""
        places = {layer: _place(attention) for layer, attention in self._attention.items()}
        if not all(places.values()):  # vLLM measures memory before there is a cache
            return
        for layer, source in enumerate(self.text_config.kv_source_layers):  # type: ignore[attr-defined]
            if layer in places and places[layer] != places[source]:
                raise InputError(
                    f"vLLM gave layer {layer} a KV cache of its own, instead of that of layer {source}",
                    fix="Use a version of vLLM that docs/serving.md lists, and report this.",
                )
        self._sharing_proven = True


class ClaForCausalLM(SharedCache, TransformersForCausalLM):
    """Serves every family but those with experts."""


class ClaMoEForCausalLM(SharedCache, TransformersMoEForCausalLM):
    """Serves families with experts."""


def _check_settings(vllm_config: "VllmConfig", config: Any) -> None:
    """Refuse what vLLM would do wrong without a word. Raises InputError."""
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        raise InputError(
            "--kv-sharing-fast-prefill does not fit Cross-Layer Attention",
            why="It skips consumers while the prompt is read, which needs all of them at the end of the model.",
            fix="Leave it out.",
        )
    if FAMILIES[config.model_type.removeprefix("cla_")].sinks and not hasattr(transformers_backend, "check_sinks"):
        raise InputError(
            "This version of vLLM leaves out attention sinks",
            why="Its Transformers backend hands them to no kernel, and says nothing.",
            fix="Use vLLM 0.32 or later.",
        )
    if "gemma" in config.model_type and vllm_config.model_config.dtype == torch.float16:
        raise InputError(
            "Gemma models overflow in float16",
            why="vLLM refuses it for the source model, and knows the converted one by another name.",
            fix="Use --dtype bfloat16 or float32.",
        )


def _place(attention: Any) -> int:
    """Where the cache of a layer begins; 0 while there is none."""
    cache = attention.kv_cache
    cache = cache[0] if isinstance(cache, list) and cache else cache  # a list in earlier versions
    return cache.data_ptr() if isinstance(cache, torch.Tensor) and cache.numel() else 0
