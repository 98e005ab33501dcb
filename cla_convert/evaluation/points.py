"""All points of a run (source, converted, uptrained) measured alike: the same tasks, texts, batch size, everything."""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipe import Evaluate
from . import batch
from .harness import common_settings, evaluate
from .texts import Texts, measure_texts

Json = dict[str, Any]


@dataclass(frozen=True)
class Conditions:
    """What is the same at every point, the batch size apart."""

    out: Path
    """Receives batch_size.json and a folder a point."""
    device: str
    seed: int
    """Of few-shot examples, generated documents and torch's generator."""
    texts: Texts
    """What else to measure, on plain text."""
    cache_dir: Path | None = None
    """Task results of the first point, shared between runs."""
    accelerator: Any = None
    """Where several processes share the work: see `shared_work`."""


def evaluate_points(points: dict[str, Path], spec: Evaluate, conditions: Conditions) -> dict[str, Json]:
    """Measure every point into `conditions.out`/<point>; what is there already under the same settings is kept.

    Args:
        points: folders of models by name, the source model first.
        spec: the recipe's `eval` section.
        conditions: everything else.

    Returns:
        {point: results.json, with `texts` by file name}.

    Raises:
        UsageError, InputError: as `harness.evaluate`, and where the batch does not fit, naming one that does.
    """
    from accelerate.utils.memory import clear_device_cache

    first = next(iter(points))
    with conditions.accelerator.main_process_first() if conditions.accelerator else nullcontext():
        size = batch.settle(spec, points[first], conditions.out, conditions.device)
    settled = spec.model_copy(update={"batch_size": size})
    results: dict[str, Json] = {}
    full = None
    for name, model in points.items():
        try:
            results[name] = _measure(name, model, settled, conditions, name == first)
        except batch.BatchTooLarge:  # and leave the handler, which holds on to what did not fit
            full = model
            break
    if full is not None:
        clear_device_cache(garbage_collection=True)
        raise batch.too_large(spec, full, size, conditions.device)
    return results


def _measure(name: str, model: Path, spec: Evaluate, conditions: Conditions, first: bool) -> Json:
    out, device, seed = conditions.out / name, conditions.device, conditions.seed
    result = evaluate(
        model, spec, out, device=device, seed=seed, cache_dir=conditions.cache_dir if first else None, label=name,
        accelerator=conditions.accelerator,
    )  # fmt: skip
    if not result:  # not the first process
        return result
    here = spec.model_copy(update={"backend": "hf"})  # texts are read with transformers, whatever scores the tasks
    common = common_settings(here, device, seed)
    identity = result["model_fingerprint"]
    measured = measure_texts(conditions.texts, model, out, common, identity, device=device, label=name)
    return result | {"texts": measured}


def shared_work(device: str) -> Any:
    """accelerate's Accelerator if torchrun or `accelerate launch` started several processes, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=device == "cpu")
