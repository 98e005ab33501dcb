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
    register_configs()
    for family in families:
        _register_models(family)


def register_configs() -> None:
    """Teach AutoConfig the CLA families: the part of `register` that imports no modelling code."""
    for family in _all():
        _register_config(family)


def register_type(model_type: object) -> None:
    """Teach the Auto classes what a config.json of this `model_type` names: nothing where it is none of ours.

    The code of all families takes seconds to import.
    """
    for family in _all():
        if family.cla_type == model_type:
            _register_config(family)
            if family.model_type in FAMILIES:
                _register_models(family)


def _all() -> Iterable[Family]:
    return *FAMILIES.values(), *(inner.code for inner in INNER.values())


def _register_config(family: Family) -> None:
    from transformers import AutoConfig

    AutoConfig.register(family.cla_type, _config_class(family), exist_ok=True)


def _register_models(family: Family) -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    classes = cla_classes(family)
    AutoModel.register(classes["Config"], classes["Model"], exist_ok=True)
    AutoModelForCausalLM.register(classes["Config"], classes["ForCausalLM"], exist_ok=True)
    AutoModelForSequenceClassification.register(classes["Config"], classes["ForSequenceClassification"], exist_ok=True)


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
