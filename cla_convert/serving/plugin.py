"""The plugin of vLLM: CLA architectures become known, without --trust-remote-code, and share their KV cache.

vLLM calls `register` in every process, whatever model it serves: it must be quick, may be called twice, and must not
fail where another model is served. What cannot work is refused when a CLA model is loaded.
"""

import logging

from ..models.classes import register_configs
from ..models.families import FAMILIES
from ..models.whole_rows import WHOLES

MODELS = f"{__package__}.vllm_models"

logger = logging.getLogger("vllm.plugins.cla_convert")  # below vllm's own, which has a handler


def register() -> None:
    """Tell vLLM which classes serve the CLA architectures."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models import registry  # pyright: ignore[reportMissingImports]

    try:
        register_configs()
    except ImportError as error:  # beside an older transformers, as vLLM 0.26 allows
        logger.warning("cla-convert: no Cross-Layer Attention models here, they need transformers 5.16: %s", error)
        return
    # With --model-impl transformers, vLLM asks this table first and would otherwise take its own class: no sharing.
    by_transformers = getattr(registry, "_TRANSFORMERS_BACKEND_MODELS", {})
    served = {
        family.class_name("ForCausalLM"): f"Cla{'MoE' if family.code.experts else ''}ForCausalLM"
        for family in FAMILIES.values()
    }
    wholes = {
        whole.class_name("ForConditionalGeneration"): "ClaForCausalLM" for whole in WHOLES.values()
    }  # refuses them
    for architecture, served_by in (served | wholes).items():
        if architecture not in ModelRegistry.models:
            ModelRegistry.register_model(architecture, f"{MODELS}:{served_by}")
        by_transformers.setdefault(architecture, ("transformers", served_by))
