"""Which weights are trained, by which optimiser and at which learning rate."""

import re
from collections.abc import Iterator
from typing import Any, Literal

import torch

from ..environment import world_size
from ..errors import InputError
from ..recipe import Train

Part = Literal["shared", "attention", "other"]
"""`shared`: attention of layers that share K/V, owners and consumers; `attention`: of the others; `other`: the rest."""

_LAYER = re.compile(r"\b(?:layers|h)\.\d+\.")
_ATTENTION = re.compile(r"\b(?:layers|h)\.(\d+)\.(?:self_attn|attn)\.")


def parts_of(model: Any) -> Iterator[tuple[str, torch.nn.Parameter, Part]]:
    """Name, parameter and part of everything in the model; tied parameters appear once."""
    sources = getattr(model.config, "kv_source_layers", None) or []
    for name, parameter in model.named_parameters():
        found = _ATTENTION.search(name)
        shares = found and sources and sources.count(sources[int(found[1])]) > 1
        yield name, parameter, "shared" if shares else "attention" if found else "other"


def freeze_all_but(model: Any, wanted: Literal["all", "attention", "shared"]) -> None:
    """Let gradients reach what is to be trained only. Raises InputError if that is nothing."""
    kept = {"all": ("shared", "attention", "other"), "attention": ("shared", "attention"), "shared": ("shared",)}
    for _, parameter, part in parts_of(model):
        parameter.requires_grad_(part in kept[wanted])
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"train.parameters={wanted} leaves nothing to train",
            "No layer of the model shares its K/V with another one." if wanted == "shared" else "",
            "Train all, or convert the model first.",
        )


def check_optimizer(train: Train) -> None:
    """Raise InputError if the optimiser cannot be had here."""
    if train.optimizer != "muon":
        return
    if not hasattr(torch.optim, "Muon"):
        raise InputError(
            f"train.optimizer=muon needs torch 2.9 or later, this is {torch.__version__}",
            fix="Update torch, or use adamw.",
        )
    if world_size() > 1:
        raise InputError(
            "train.optimizer=muon trains in one process",
            "torch's Muon iterates in bfloat16: sharded, it gives weights that depend on the number of processes.",
            "Start one process, or use adamw.",
        )


def make_optimizers(model: Any, train: Train, device_type: str) -> tuple[torch.optim.Optimizer, ...]:
    """AdamW over what is trained; with `muon`, Muon over the layers' matrices. Groups carry their `peak` learning rate.

    Weight decay on matrices only: norms and biases have no scale to decay.
    """
    groups: dict[bool, dict[tuple[float, float], list[torch.nn.Parameter]]] = {}
    for name, parameter, part in parts_of(model):
        if parameter.requires_grad:
            decay = train.weight_decay if parameter.ndim >= 2 else 0.0
            # The embedding is a table, not a map between activations; stacked experts are more than a matrix.
            muon = train.optimizer == "muon" and parameter.ndim == 2 and bool(_LAYER.search(name))
            groups.setdefault(muon, {}).setdefault((peak_rate(part, train), decay), []).append(parameter)
    return tuple(
        (_muon if muon else _adamw)(
            [{"params": params, "peak": peak, "weight_decay": decay} for (peak, decay), params in chosen.items()],
            train,
            device_type,
        )
        for muon, chosen in sorted(groups.items())
    )


def _adamw(groups: list[dict[str, Any]], train: Train, device_type: str) -> torch.optim.Optimizer:
    fused = device_type in ("cpu", "cuda")  # one pass over the parameters instead of a dozen
    return torch.optim.AdamW(groups, lr=groups[0]["peak"], betas=train.betas, fused=fused)


def _muon(groups: list[dict[str, Any]], train: Train, _device_type: str) -> torch.optim.Optimizer:
    """Updates whose singular values are all near 1, scaled to the size of AdamW's: the same learning rates fit."""
    return torch.optim.Muon(groups, lr=groups[0]["peak"], adjust_lr_fn="match_rms_adamw")


def peak_rate(part: Part, train: Train) -> float:
    """The peak learning rate of a part: its own, or attention's for `shared`, or the one for all."""
    rates, rate = train.learning_rates, train.learning_rate
    assert rate != "auto", "derived() makes it a number"
    fallback = rates.get("attention", rate) if part == "shared" else rate
    return rates.get(part, fallback)
