"""The CLA classes themselves, as they ship: found by family, and made known to transformers' Auto classes."""

import importlib
from typing import Any

from .families import FAMILIES, Family


def register() -> None:
    """Teach transformers' Auto classes the CLA families, so that outputs load here without trust_remote_code."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    for family in FAMILIES.values():
        classes = cla_classes(family)
        AutoConfig.register(family.cla_type, classes["Config"], exist_ok=True)
        AutoModel.register(classes["Config"], classes["Model"], exist_ok=True)
        AutoModelForCausalLM.register(classes["Config"], classes["ForCausalLM"], exist_ok=True)
        AutoModelForSequenceClassification.register(
            classes["Config"], classes["ForSequenceClassification"], exist_ok=True
        )


def cla_classes(family: Family) -> dict[str, Any]:
    """The CLA classes of a family: `Config`, `DecoderLayer`, `Model`, `ForCausalLM`, `ForSequenceClassification`."""
    config, modeling = (importlib.import_module(f"{__package__}.generated.{file.stem}") for file in family.code_files)
    kinds = ("DecoderLayer", "Model", "ForCausalLM", "ForSequenceClassification")
    return {
        "Config": getattr(config, family.class_name("Config")),
        **{kind: getattr(modeling, family.class_name(kind)) for kind in kinds},
    }
