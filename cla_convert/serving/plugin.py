"""The plugin of vLLM: CLA architectures become known, without --trust-remote-code, and share their KV cache.

vLLM calls `register` in every process, whatever model it serves: it must be quick, may be called twice, and must not
fail where another model is served. What cannot work is refused when a CLA model is loaded.
"""

from ..models.classes import register_configs
from ..models.families import FAMILIES

MODELS = f"{__package__}.vllm_models"


def register() -> None:
    """Tell vLLM which classes serve the CLA architectures."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models import registry  # pyright: ignore[reportMissingImports]

    register_configs()
    # With --model-impl transformers, vLLM asks this table first and would otherwise take its own class: no sharing.
    by_transformers = getattr(registry, "_TRANSFORMERS_BACKEND_MODELS", {})
    for family in FAMILIES.values():
        architecture, served_by = (
            family.class_name("ForCausalLM"),
            f"Cla{'MoE' if family.code.experts else ''}ForCausalLM",
        )
        if architecture not in ModelRegistry.models:
            ModelRegistry.register_model(architecture, f"{MODELS}:{served_by}")
        by_transformers.setdefault(architecture, ("transformers", served_by))
