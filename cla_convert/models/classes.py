"""The CLA classes themselves, as they ship: found by family, and made known to transformers' Auto classes."""

import importlib
from collections.abc import Iterable
from typing import Any

from .families import FAMILIES, Family
from .whole_rows import INNER


def register(families: Iterable[Family] = FAMILIES.values()) -> None:
    """Teach transformers' Auto classes the CLA families, so that outputs load here without trust_remote_code.

    `families`: those whose modelling code is wanted, each of which takes a moment to import.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    register_configs()
    for family in families:
        classes = cla_classes(family)
        AutoModel.register(classes["Config"], classes["Model"], exist_ok=True)
        AutoModelForCausalLM.register(classes["Config"], classes["ForCausalLM"], exist_ok=True)
        AutoModelForSequenceClassification.register(
            classes["Config"], classes["ForSequenceClassification"], exist_ok=True
        )


def register_configs() -> None:
    """Teach AutoConfig the CLA families: the part of `register` that imports no modelling code."""
    from transformers import AutoConfig

    for family in (*FAMILIES.values(), *(inner.code for inner in INNER.values())):
        AutoConfig.register(family.cla_type, _config_class(family), exist_ok=True)


def cla_classes(family: Family) -> dict[str, Any]:
    """The CLA classes of a family: `Config`, `DecoderLayer`, `Model`, `ForCausalLM`, `ForSequenceClassification`."""
    modeling = importlib.import_module(f"{family.code_package}.{family.code_files[1].stem}")
    kinds = ("DecoderLayer", "Model", "ForCausalLM", "ForSequenceClassification")
    return {
        "Config": _config_class(family),
        **{kind: getattr(modeling, family.class_name(kind)) for kind in kinds},
    }


def _config_class(family: Family) -> Any:
    module = importlib.import_module(f"{family.code_package}.{family.code_files[0].stem}")
    return getattr(module, family.class_name("Config"))
