"""Whether tensors are those of the class that config.json names.

transformers itself loads them, on the meta device, where tensors have names and shapes and no contents. So tied
weights, prefixes, old names and the ways in which experts are stored are its own affair, and what it would say after
loading the weights for minutes it says here from their headers.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError
from .checkpoint import Checkpoint
from .export import IMPLEMENTATIONS, cla_classes, stays_float32
from .families import Family
from .headers import FLOATING, TensorInfo
from .packed import refuse_scales
from .whole import Around, cannot_be_built

_OTHER_CONFIG = "Check that config.json belongs to the weights."


def unused_tensors(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> set[str]:
    """Names of tensors that the model of a config.json has no place for.

    Args:
        config: config.json of a model that transformers knows.
        tensors: everything that is stored for it.

    Raises:
        InputError: transformers cannot build the model, or a tensor is missing or has another shape than it needs.
    """
    settings = model_config(config)
    return _unused(model_class(settings), settings, tensors)


def check_whole(around: Around, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise InputError unless the model around a language model finds all that it needs among `tensors`."""
    import transformers

    with _explained():
        settings = getattr(transformers, f"{around.whole.class_prefix}Config").from_dict(_plain(around.config))
    _unused(getattr(transformers, f"{around.whole.class_prefix}ForConditionalGeneration"), settings, tensors)


def model_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration of a config.json. Raises InputError if it accepts none such."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with _explained():
        return CONFIG_MAPPING[str(config.get("model_type"))].from_dict(_plain(config))


def model_class(config: Any) -> Any:
    """The class that AutoModelForCausalLM loads for a configuration."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping[type(config)]


def check_converted(family: Family, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise InputError unless `tensors` are exactly those of the CLA model with this config.json."""
    classes = cla_classes(family)
    with _explained():
        settings = classes["Config"].from_dict(_plain(config))
    if unused := _unused(classes["ForCausalLM"], settings, tensors):
        raise InputError(
            f"The CLA code of {family.model_type!r} has no place for {_some(unused)}",
            why="The checkpoint stores them under names, or in pieces, that only transformers' own class reads.",
            fix="Load the model with transformers and save it again, then convert that.",
        )


def kept_in_float32(
    family: Family, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], dtype: str
) -> set[str]:
    """Which tensors of a CLA model transformers leaves in float32 when it loads the model in `dtype`.

    Biases by which experts are chosen, most of all: rounded, they choose others. Some are named by the class, others
    made in float32 whatever the model's own dtype.
    """
    import torch

    from .stored import StoredTensors

    classes = cla_classes(family)
    with _explained(), torch.device("meta"):
        settings = classes["Config"].from_dict(_plain(config))
        model = classes["ForCausalLM"]._from_config(settings, dtype=getattr(torch, dtype))
    kept = stays_float32(model, getattr(torch, dtype))
    made = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    parts = StoredTensors(Checkpoint(Path(), {}, dict(tensors)), model).parts
    return {part.name for name, found in parts.items() if kept.search(name) or name in made for part in found}


def _unused(cls: Any, settings: Any, tensors: Mapping[str, TensorInfo]) -> set[str]:
    import torch

    with _explained(), _in_pieces(cls, settings, tensors):
        empty = {
            name: torch.empty(info.shape, dtype=getattr(torch, FLOATING.get(info.dtype, "float32")), device="meta")
            for name, info in tensors.items()
        }
        _, found = cls.from_pretrained(
            None, config=settings, state_dict=empty, device_map={"": "meta"}, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    _refuse_missing(set(found["missing_keys"]), cls)
    _refuse_misshapen([(str(name), tuple(has), tuple(needs)) for name, has, needs in found["mismatched_keys"]])
    unused = set(found["unexpected_keys"])
    if unknown := unused - tensors.keys():
        refuse_scales(unused, tensors)
        raise InputError(
            f"The checkpoint stores {_some(unknown)} under another name",
            why=f"transformers renames them, and finds no place for them in a {cls.__name__}.",
            fix="Load the model with transformers and save it again, then convert that.",
        )
    return unused


@contextmanager
def _in_pieces(cls: Any, settings: Any, tensors: Mapping[str, TensorInfo]) -> Iterator[None]:
    """If pieces that are to be stacked (experts) do not go together, say which; transformers says only that."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    try:
        yield
    except RuntimeError:
        if getattr(settings, "num_local_experts", getattr(settings, "num_experts", 0)) > len(tensors):
            raise  # not to be counted up
        with torch.device("meta"):
            model = cls(settings)
        stored = revert_weight_conversion(model, model.state_dict())
        _refuse_missing(stored.keys() - tensors.keys() - (model._tied_weights_keys or {}).keys(), cls)
        shapes = {
            name: (tensors[name].shape, tuple(tensor.shape)) for name, tensor in stored.items() if name in tensors
        }
        _refuse_misshapen([(name, has, needs) for name, (has, needs) in shapes.items() if has != needs])
        raise


def _refuse_missing(missing: set[str], cls: Any) -> None:
    if missing:
        raise InputError(
            f"The checkpoint lacks {_some(missing)}",
            why=f"A {cls.__name__} with this config.json has them.",
            fix="Check that the checkpoint is whole. " + _OTHER_CONFIG,
        )


def _refuse_misshapen(found: list[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> None:
    if found:
        name, has, needs = min(found)
        more = f", and {len(found) - 1} others differ too" if len(found) > 1 else ""
        raise InputError(
            f"{name} has the shape {list(has)} where config.json promises {list(needs)}{more}", fix=_OTHER_CONFIG
        )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy, because configurations change nested values; without what does not tell the shape of a model."""
    without = {"auto_map", "quantization_config", "transformers_weights", *IMPLEMENTATIONS}
    return copy.deepcopy({key: value for key, value in config.items() if key not in without})


def _some(names: set[str]) -> str:
    """The names, or the first few of them."""
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _explained() -> Iterator[None]:
    """Turn whatever transformers raises into an InputError, and keep what it logs to ourselves."""
    from transformers.utils import logging as theirs  # first of all: it sets its own level when it is imported

    loggers = [theirs.get_logger("transformers"), logging.getLogger("accelerate")]
    levels, bars = [logger.level for logger in loggers], theirs.is_progress_bar_enabled()
    try:
        theirs.disable_progress_bar()
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    except InputError:
        raise
    except Exception as error:  # of any kind: what a config.json may hold is whatever people write
        raise cannot_be_built(error) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            theirs.enable_progress_bar()
