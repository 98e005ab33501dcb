"""One batch size for all points of a run: found once and recorded.

Scores can move with the batch size (padding and kernels change the last bits), so two points measured with different
ones are not comparable. eval/batch_size.json says what was used:

    requested     8 or "auto", from the recipe
    batch_size    what all points were measured with
    found         given (by the recipe), probed (on the source model) or default (auto on a CPU)
    device        cuda, cpu, ...
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..console import say
from ..environment import choose_dtype
from ..errors import InputError
from ..files import read_json, write_json
from ..recipe import Evaluate
from ..run_folder import EvaluationFolder

LARGEST = 64
ON_CPU = 8
"""A CPU does not run out of memory before it is slow; larger batches only pad more."""


class BatchTooLarge(Exception):
    """The device ran out of memory with this batch size."""


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Turn an allocator's failure into BatchTooLarge; other errors pass."""
    from accelerate.utils.memory import should_reduce_batch_size

    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error):
            raise BatchTooLarge from error
        raise


def settle(spec: Evaluate, model_dir: Path, out: Path, device: str) -> int:
    """The batch size of this run: what is on record for the same request, else the recipe's, else probed."""
    kind = device.partition(":")[0]
    record = read_json(EvaluationFolder(out).batch_size) or {}
    recorded = record.get("batch_size")
    if (record.get("requested"), record.get("device")) == (spec.batch_size, kind) and isinstance(recorded, int):
        return recorded
    if spec.batch_size != "auto":
        size, found = spec.batch_size, "given"
    elif kind == "cpu":
        size, found = ON_CPU, "default"
    else:
        size, found = _probe(model_dir, spec.max_length, device), "probed"
        say(f"batch size {size}: the largest power of two that fits {spec.max_length} tokens")
    record = {"requested": spec.batch_size, "batch_size": size, "found": found, "device": kind}
    write_json(EvaluationFolder(out).batch_size, record)
    return size


def too_large(spec: Evaluate, model_dir: Path, size: int, device: str) -> InputError:
    """The refusal of a batch size that a point does not fit into, with one that does fit."""
    fits = _probe(model_dir, spec.max_length, device, size // 2)
    return InputError(
        f"Out of memory with batch size {size}",
        why="Every point must be measured with the same one, because scores can move with it.",
        fix=f"--set eval.batch_size={fits} fits {spec.max_length} tokens: every task is measured anew with it.",
    )


def too_long() -> InputError:
    """The refusal when not even one sequence fits."""
    return InputError(
        "The device has too little memory for a single sequence",
        fix="Lower eval.max_length (and eval.retrieval.lengths, eval.perplexity windows), or use a larger device.",
    )


def _probe(model_dir: Path, max_length: int, device: str, largest: int = LARGEST) -> int:
    """`largest`, or the first of its halves whose full-length logits fit, as lm-eval computes them."""
    from accelerate.utils.memory import clear_device_cache

    from ..models.placement import load_where_it_fits
    from .context import fed_tokens

    model: Any = load_where_it_fits(model_dir, dtype=choose_dtype(device), device=device)
    length, size = fed_tokens(model.config, max_length), largest
    while size:
        try:
            with torch.no_grad(), out_of_memory():
                ids = torch.ones((size, length), dtype=torch.long, device=model.device)
                torch.log_softmax(model(input_ids=ids, use_cache=False).logits, dim=-1)
            return size
        except BatchTooLarge:
            size //= 2
        finally:
            clear_device_cache(garbage_collection=True)
    raise too_long()
