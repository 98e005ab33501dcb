"""Execute a plan: stream tensors from the source's shards into a new folder that loads anywhere."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bars import Bar, tick
from ..console import progress
from ..environment import peak_memory_bytes
from ..errors import InputError
from ..files import write_json
from ..models.checkpoint import Checkpoint
from ..models.fingerprint import fingerprint
from ..models.finite import naming_not_finite
from ..models.headers import FLOATING
from ..models.shipped import write_sidecars
from ..models.tokenization import keep_tokenizer
from ..models.writer import MANIFEST, ShardWriter, check_disk, check_output, publishing
from ..version import __version__
from .initialisation import INITIALISATIONS, CalibrationText, GroupFit, LayerPatch
from .kv_heads import adjacent, adjacent_groups, grouped
from .plan import Plan
from .sharing import activation_bytes
from .tensor_plan import TensorPlan

if TYPE_CHECKING:
    from torch import Tensor


def convert(
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    *,
    calibration: CalibrationText | None = None,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    named: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """Write the converted model to `out` and return the result (the keys of `convert --json`).

    Args:
        plan: what to do, of `checkpoint`.
        checkpoint: the source model.
        out: folder to publish; appears whole or not at all.
        calibration: text and device; needed for `init: calibrated` only.
        max_shard_size: bytes of a shard at most.
        overwrite: replace an earlier output of this tool.
        named: what the user calls the source model, for the manifest: `model`, `revision`.

    Raises:
        InputError: the disk is too small (before anything is written), `out` must not be replaced, the tokenizer would
            give other ids than the source's, a tensor of a group does not have the shape of its owner's, weights of
            the source are NaN or infinite, or the asked dtype cannot hold them.
    """
    started = time.monotonic()
    check_output(out, overwrite=overwrite)
    spilled = 0
    if calibration:
        rows = calibration.tokens.shape
        spilled = spilled_bytes(plan.kv_source_layers, plan.shape.hidden_size, calibration.device, *rows)
    check_disk(out.parent, plan.output_bytes + spilled)
    with publishing(out, overwrite=overwrite) as staging:
        write_json(staging / "config.json", _config(plan, checkpoint))
        write_sidecars(checkpoint, plan.family, staging)
        tokenizer = keep_tokenizer(checkpoint.folder, staging)  # before the weights: it may refuse
        init, fewer = INITIALISATIONS.named(plan.init), plan.heads_each > 1
        patches = init.patches(checkpoint, plan.kv_source_layers, plan.kv_heads, calibration, staging)
        steps = init.steps(plan.kv_source_layers, calibration, every=fewer)
        bar = progress(steps, "matching", unit="step", counts="matching") if steps else _tensors(plan)
        with naming_not_finite(checkpoint, plan.unused), bar:
            fits = _write(plan, checkpoint, patches, staging, max_shard_size)
        made = manifest(plan, checkpoint, calibration, named or {}) | _head_groups(plan, fits)
        write_json(staging / MANIFEST, made | {"tokenizer": tokenizer})
    return plan.to_json() | {
        "output": str(out),
        "groups": _groups(plan, fits),
        **({"calibration": made["calibration"]} if calibration else {}),
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": peak_memory_bytes("cpu"),
    }


def _config(plan: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of the output: of the whole model, if the source is more than a language model."""
    config = plan.config(checkpoint.config)
    return checkpoint.around.config_with(config) if checkpoint.around else config


def manifest(
    plan: Plan, checkpoint: Checkpoint, calibration: CalibrationText | None = None, named: Mapping[str, str | None] = {}
) -> dict[str, Any]:
    """cla_manifest.json: where the model comes from and how it was made."""
    return {
        "cla_convert": __version__,
        "source": {
            "folder": checkpoint.folder.name,
            "fingerprint": fingerprint(checkpoint.folder),
            **named,
            **checkpoint.origin,
        },
        "sharing": plan.sharing,
        "init": plan.init,
        "kv_source_layers": plan.kv_source_layers,
        "dropped": [tensor.name for tensor in plan.tensors if tensor.action == "drop"],
        "changed": [tensor.name for tensor in plan.tensors if tensor.action in ("pool", "fit")],
        **({"calibration": {"tokens": calibration.tokens.numel(), "text": calibration.digest}} if calibration else {}),
    }


def _tensors(plan: Plan) -> Bar:
    return progress(len(plan.tensors), "converting", unit="tensor", counts="tensors")


def _write(
    plan: Plan, checkpoint: Checkpoint, patches: Iterator[LayerPatch], out: Path, max_shard_size: int
) -> list[GroupFit]:
    """Write the output's tensors, in the plan's order; returns what calibration found.

    A thread writes a layer while the next one is computed.
    """
    written = plan.written(checkpoint)
    writer = ShardWriter(out, checkpoint.as_stored(written), max_shard_size)
    writer.copy_others(checkpoint)
    fits: list[GroupFit] = []
    layer, patch, writes = None, None, list[Future[None]]()
    with ThreadPoolExecutor(1) as disk:
        for tensor in plan.tensors:
            if tensor.layer != layer:
                layer, patch = tensor.layer, None
                patch = next(patches, None)
                fits.extend([patch.fit] if patch and patch.fit else [])
                while writes:
                    writes.pop(0).result()
            tick("tensors")
            if tensor.action != "drop":
                fitted = patch.tensors.pop(tensor.name, None) if patch else None
                dtype = written[tensor.name].dtype
                writes.append(disk.submit(_write_one, tensor, fitted, dtype, plan, checkpoint, writer))
                del fitted  # written, it goes
        while writes:
            writes.pop(0).result()
    writer.finish()
    return fits


def _write_one(
    tensor: TensorPlan, fitted: "Tensor | None", wanted: str, plan: Plan, checkpoint: Checkpoint, writer: ShardWriter
) -> None:
    """Write a tensor, `fitted` if calibration brought it, in the dtype `wanted`."""
    import torch

    info, dtype = checkpoint.tensors[tensor.name], getattr(torch, FLOATING[wanted])
    name = checkpoint.stored_name(tensor.name)
    if fitted is not None:
        writer.add(name, fitted.to(dtype))
    elif tensor.action == "pool":
        writer.add(name, _pooled(tensor, checkpoint, plan).to(dtype))
    elif info.dtype == wanted:  # untouched bytes need no torch
        writer.copy(name, checkpoint.folder / info.file, info.start)
    else:
        writer.add(name, checkpoint.read(tensor.name).to(dtype))


def spilled_bytes(
    sources: Sequence[int | None], hidden_size: int, device: str | Sequence[str], rows: int, length: int
) -> int:
    """Bytes of activations that will lie beside the output while it is made; 0 where a GPU or the memory holds them."""
    import torch

    from .factories import devices_for
    from .streams import places_for, stream_dtype

    devices = [torch.device(one) for one in devices_for(device, hidden_size, rows)]
    needed = activation_bytes(sources, rows * length, hidden_size, stream_dtype(devices[0]).itemsize)
    return 0 if places_for(devices, needed) else needed


def _pooled(tensor: TensorPlan, checkpoint: Checkpoint, plan: Plan) -> "Tensor":
    """A tensor pooled over its group, and over adjacent heads."""
    members = [checkpoint.read(name) for name in tensor.members]
    if len({member.shape for member in members}) > 1:
        raise InputError(
            f"The tensors pooled into {tensor.name} differ in shape",
            why=", ".join(f"{name}: {tuple(m.shape)}" for name, m in zip(tensor.members, members, strict=True)),
        )
    if tensor.heads > 1:
        members = [part for member in members for part in adjacent(member, plan.kv_heads, tensor.heads)]
    return INITIALISATIONS.named(plan.init).pool(members)


def _head_groups(plan: Plan, fits: list[GroupFit]) -> dict[str, Any]:
    """For the manifest: which KV heads of every layer became one; nothing where each stays itself."""
    if plan.heads_each == 1:
        return {}
    groups = dict.fromkeys(plan.shape.kv_layers, adjacent_groups(plan.kv_heads, plan.heads_each))
    for fit in fits:
        groups |= {layer: grouped(order, plan.heads_each) for layer, order in fit.head_permutation.items()}
    return {"kv_heads": {"before": plan.shape.num_key_value_heads, "after": plan.kv_heads, "groups": groups}}


def _groups(plan: Plan, fits: list[GroupFit]) -> list[dict[str, Any]]:
    """Per group its layers and, where it was calibrated, what that found."""
    found = {fit.layers[0]: fit for fit in fits}
    groups: list[dict[str, Any]] = []
    for layers in plan.groups:
        group: dict[str, Any] = {"layers": layers}
        if fit := found.get(layers[0]):
            group |= {
                "head_permutation": {str(layer): list(order) for layer, order in fit.head_permutation.items()},
                "captured_k": round(fit.captured_k, 4),
                "captured_v": round(fit.captured_v, 4),
                "damage": round(fit.mismatch, 5),
            }
            if fit.temperature_error is not None:
                group["temperature_error"] = round(fit.temperature_error, 4)
        groups.append(group)
    return groups
