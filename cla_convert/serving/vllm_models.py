"""The classes that serve CLA models in vLLM: its Transformers backend, with consumers mapped to their owner's cache.

The modelling code is the one that ships with every output (this package's copy of it); vLLM replaces its linear layers
and its attention. Imported by vLLM when a CLA model is loaded, after `plugin.register` has named it.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
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
from ..files import read_kept
from ..models.classes import register
from ..models.families import FAMILIES
from ..models.family import Family
from ..models.shape import shape_of
from ..models.writer import MANIFEST
from .rope import settle_frequencies
from .sharing import (
    check_attends,
    check_cache_dtype,
    check_language_model,
    check_stages,
    copies_of_heads,
    gain,
    layer_of,
    owner_name,
    windows_of,
)
from .versions import check_family, check_vllm

if TYPE_CHECKING:
    from vllm.config import VllmConfig  # pyright: ignore[reportMissingImports]

VLLM = check_vllm()

SCALES = ("k_scale", "v_scale")
"""Of a quantised cache, while weights are loaded."""
FORMAT = ("kv_cache_dtype", "num_kv_heads", "head_size", "sliding_window")
"""What a consumer has to know of its owner's cache as the owner does."""

logger = logging.getLogger("vllm.plugins.cla_convert")  # below vllm's own, which has a handler


class SharedCache:
    """What a class of vLLM's Transformers backend needs to serve a CLA model; stands before it among the bases."""

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        self._attention: dict[int, Any] = {}
        self._sharing_proven = False
        config = vllm_config.model_config.hf_config
        check_language_model(config.model_type)
        check_attends(config.kv_source_layers)
        self._sources = sources = list[int](config.kv_source_layers)
        self._processes: int = vllm_config.parallel_config.tensor_parallel_size
        stages = vllm_config.parallel_config.pipeline_parallel_size
        starts = [get_pp_indices(len(sources), rank, stages)[0] for rank in range(stages)]
        check_stages(sources, [*starts, len(sources)])
        family = FAMILIES[config.model_type.removeprefix("cla_")]
        if warning := check_family(family, VLLM):
            logger.warning("cla-convert: %s", warning)
        _check_settings(vllm_config, family)
        self._family, self._copies = family, _copy_heads(config, family, self._processes)
        self._windows = windows_of(config.to_dict())
        register([family])  # vLLM builds the model by AutoModel
        if getattr(config, "num_nextn_predict_layers", 0) is None:
            config.num_nextn_predict_layers = 0  # vLLM counts them, and null (Mellum's) is no number
        config.vllm_kv_cache = "shared"  # the modelling code refuses vLLM without us
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        if logits := getattr(self, "logits_processor", None):  # the last stage has one
            logits.scale /= getattr(config, "logits_scaling", 1.0)  # Granite's; vLLM reads logit_scale
            logits.soft_cap = getattr(config, "final_logit_softcapping", None)
        length = vllm_config.model_config.max_model_len
        for kind in settle_frequencies(self, length):  # type: ignore[arg-type]
            logger.info("cla-convert: RoPE of type %s is that of texts of %d tokens (--max-model-len)", kind, length)
        self._prove_mapping()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As ever; a KV head that several processes hold is stored once, and so are the scales of a quantised cache."""
        loaded = super().load_weights(self._copied(weights))  # type: ignore[misc]
        for layer, attention in self._attention.items():
            owner = self._attention[self._sources[layer]]
            for scale in SCALES:
                if owner is not attention and hasattr(owner, scale):
                    getattr(attention, scale).data.copy_(getattr(owner, scale).data)
        return loaded

    def _copied(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        heads = max(1, self._processes // self._copies)
        for name, tensor in weights:
            place = self._family.place(name) if self._copies > 1 else None
            if place and place.module in ("k_proj", "v_proj"):
                tensor = tensor.unflatten(0, (heads, -1)).repeat_interleave(self._copies, 0).flatten(0, 1)
            yield name, tensor

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
        """`attention`, told whose cache a consumer reads, and every layer's window.

        Otherwise vLLM gives the window of config.json to layers that are full: where all of them are, up to 0.31, and
        where the family knows no windows and ignores the number.
        """
        sources = self._sources

        def build(*, prefix: str, cache_config: Any, **settings: Any) -> Any:
            layer = layer_of(prefix)
            if sources[layer] != layer:
                settings["kv_sharing_target_layer_name"] = owner_name(prefix, layer, sources[layer])
            settings["per_layer_sliding_window"] = self._windows[layer]
            before, cache_config.sliding_window = cache_config.sliding_window, None
            try:
                self._attention[layer] = attention(prefix=prefix, cache_config=cache_config, **settings)
            finally:
                cache_config.sliding_window = before
            return self._attention[layer]

        return build

    def _prove_mapping(self) -> None:
        """At start-up: exactly the owners will get a KV cache, which all take for what it is. Raises InputError."""
        sources = self._sources
        buffers = sorted(i for i, layer in self._attention.items() if layer.kv_sharing_target_layer_name is None)
        owners = sorted({sources[layer] for layer in self._attention})
        if buffers != owners:
            raise InputError(
                f"vLLM would keep KV caches for layers {buffers}, and the model's owners are {owners}",
                why="The cache would be larger than the model needs, or wrong.",
                fix="Use a version of vLLM that docs/serving.md lists, and report this.",
            )
        for layer, attention in self._attention.items():
            owner = self._attention[sources[layer]]
            if any(getattr(attention, what, None) != getattr(owner, what, None) for what in FORMAT):
                raise InputError(
                    f"vLLM would read the KV cache of layer {sources[layer]} in another format for layer {layer}",
                    fix="Leave out settings of single layers, or use a version of vLLM that docs/serving.md lists.",
                )
        kept = self._attention[owners[0]]
        head_bytes = 2 * kept.head_size * kept.kv_cache_torch_dtype.itemsize
        source = max(kept.num_kv_heads, self._source_heads() // self._processes)
        logger.info("cla-convert: %s", gain(len(self._attention), len(owners), kept.num_kv_heads, source, head_bytes))

    def _source_heads(self) -> int:
        """KV heads of the source model, as far as the folder tells; 0 where it does not."""
        heads = (read_kept(Path(self.model_config.model) / MANIFEST) or {}).get("kv_heads")  # type: ignore[attr-defined]
        before = heads.get("before") if isinstance(heads, dict) else None
        return before if isinstance(before, int) else 0

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
        for layer, source in enumerate(self._sources):
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


def _check_settings(vllm_config: "VllmConfig", family: Family) -> None:
    """Refuse what vLLM would do wrong without a word. Raises InputError."""
    cache = vllm_config.cache_config
    check_cache_dtype(cache.cache_dtype, getattr(cache, "kv_cache_dtype_skip_layers", ()))
    if cache.kv_sharing_fast_prefill:
        raise InputError(
            "--kv-sharing-fast-prefill does not fit Cross-Layer Attention",
            why="It skips consumers while the prompt is read, which needs all of them at the end of the model.",
            fix="Leave it out.",
        )
    if family.sinks and not hasattr(transformers_backend, "check_sinks"):
        raise InputError(
            "This version of vLLM leaves out attention sinks",
            why="Its Transformers backend hands them to no kernel, and says nothing.",
            fix="Use vLLM 0.32 or later.",
        )
    overflows = "gemma" in family.model_type or family.model_type == "glm4"
    if overflows and vllm_config.model_config.dtype == torch.float16:
        raise InputError(
            f"{family.code.name} overflows in float16",
            why="vLLM refuses it for the source model, and knows the converted one by another name.",
            fix="Use --dtype bfloat16 or float32.",
        )


def _copy_heads(config: Any, family: Family, processes: int) -> int:
    """Let a model with fewer KV heads than tensor-parallel processes be built with a copy for each; how many of one.

    vLLM's Transformers backend would cut a head in two.

    Raises:
        InputError: the heads cannot be spread, or nobody says how: the processes would read each other's heads.
    """
    plan = {name.split(".")[-1]: how for name, how in (config.base_model_tp_plan or {}).items()}
    if processes > 1 and {plan.get(part) for part in ("q_proj", "k_proj", "v_proj")} != {"colwise"}:
        raise InputError(
            f"{family.code.name} cannot run in {processes} tensor-parallel processes",
            why="The installed transformers has no plan that gives each of them heads of its own.",
            fix="Leave out --tensor-parallel-size.",
        )
    heads = shape_of(config.to_dict()).num_key_value_heads
    copies = copies_of_heads(heads, processes)
    if copies > 1:
        setattr(config, family.key("num_key_value_heads"), processes)
    return copies


def _place(attention: Any) -> int:
    """Where the cache of a layer begins; 0 while there is none."""
    cache = attention.kv_cache
    cache = cache[0] if isinstance(cache, list) and cache else cache  # a list in earlier versions
    return cache.data_ptr() if isinstance(cache, torch.Tensor) and cache.numel() else 0
