"""Execute a plan: stream tensors from the source's shards into a new folder that loads anywhere."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..console import progress
from ..environment import peak_memory_bytes
from ..errors import InputError
from ..files import write_json
from ..models.checkpoint import Checkpoint
from ..models.export import cla_config, write_sidecars
from ..models.writer import MANIFEST, ShardWriter, check_disk, check_output, publishing
from .plan import Plan, TensorPlan
from .pooling import WEIGHT_SPACE

if TYPE_CHECKING:
    from torch import Tensor


def convert(
    plan: Plan, checkpoint: Checkpoint, out: Path, *, max_shard_size: int = 5_000_000_000, overwrite: bool = False
) -> dict[str, Any]:
    """Write the converted model to `out` and return the result (the keys of `convert --json`).

    Raises:
        InputError: the disk is too small (before anything is written), `out` must not be replaced, or a tensor of a
            group does not have the shape of its owner's.
    """
    started = time.monotonic()
    check_output(out, overwrite=overwrite)
    check_disk(out.parent, plan.output_bytes)
    with publishing(out, overwrite=overwrite) as staging:
        writer = ShardWriter(staging, max_shard_size)
        for tensor in progress_over(plan):
            if tensor.action != "drop":
                writer.add(tensor.name, _execute(tensor, checkpoint, plan))
        writer.finish()
        write_json(
            staging / "config.json", cla_config(checkpoint.config, plan.family, plan.kv_source_layers, plan.dtype)
        )
        write_sidecars(checkpoint, plan.family, staging)
        result = plan.to_json() | {
            "output": str(out),
            "seconds": round(time.monotonic() - started, 3),
            "peak_rss_bytes": peak_memory_bytes("cpu"),
        }
        write_json(staging / MANIFEST, manifest(plan, checkpoint))
    return result


def manifest(plan: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    """cla_manifest.json: where the model comes from and how it was made."""
    return {
        "cla_convert": __version__,
        "source": {
            "folder": checkpoint.folder.name,
            "fingerprint": checkpoint.fingerprint(),
            **checkpoint.origin,
        },
        "sharing": plan.sharing,
        "init": plan.init,
        "kv_source_layers": plan.kv_source_layers,
        "dropped": [tensor.name for tensor in plan.tensors if tensor.action == "drop"],
        "pooled": [tensor.name for tensor in plan.tensors if tensor.action == "pool"],
    }


def progress_over(plan: Plan) -> Any:
    """The plan's tensors, under a progress bar."""
    with progress(len(plan.tensors), "converting", unit="tensor") as bar:
        for tensor in plan.tensors:
            yield tensor
            bar.update()


def _execute(tensor: TensorPlan, checkpoint: Checkpoint, plan: Plan) -> "Tensor":
    import torch

    if tensor.action == "keep":
        value = checkpoint.read(tensor.name)
    else:
        members = [checkpoint.read(name) for name in tensor.members]
        if len({member.shape for member in members}) > 1:
            raise InputError(
                f"The tensors pooled into {tensor.name} differ in shape",
                why=", ".join(f"{name}: {tuple(m.shape)}" for name, m in zip(tensor.members, members, strict=True)),
            )
        value = WEIGHT_SPACE[plan.init](members)
    return value.to(getattr(torch, plan.dtype)) if value.is_floating_point() else value
