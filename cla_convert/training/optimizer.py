"""Which weights are trained, and at which learning rate."""

from collections.abc import Iterator
from typing import Literal

import torch
from transformers import PreTrainedModel

from ..errors import InputError
from ..models.families import family_like
from ..recipe import Train

Part = Literal["shared", "attention", "other"]
"""`shared`: attention of layers that share K/V, owners and consumers; `attention`: of the others; `other`: the rest."""


def parts_of(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Parameter, Part]]:
    """Name, parameter and part of everything in the model; tied parameters appear once."""
    sources = getattr(model.config, "kv_source_layers", None) or []
    family = family_like(model.config.model_type)
    for name, parameter in model.named_parameters():
        place = family.place(name)
        if place is None or not place.module:
            yield name, parameter, "other"
        else:
            shares = sources and sources.count(sources[place.layer]) > 1
            yield name, parameter, "shared" if shares else "attention"


def parts_trained(wanted: Literal["all", "attention", "shared"]) -> tuple[Part, ...]:
    """The parts that `train.parameters` means."""
    parts: dict[str, tuple[Part, ...]] = {"all": ("shared", "attention", "other"), "attention": ("shared", "attention")}
    return parts.get(wanted, ("shared",))


def freeze_all_but(model: PreTrainedModel, wanted: Literal["all", "attention", "shared"]) -> None:
    """Let gradients reach what is to be trained only. Raises InputError if that is nothing.

    What transformers' own class does not train (biases by which experts are chosen) is not.
    """
    for _, parameter, part in parts_of(model):
        parameter.requires_grad_(parameter.requires_grad and part in parts_trained(wanted))
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"train.parameters={wanted} leaves nothing to train",
            "No layer of the model shares its K/V with another one." if wanted == "shared" else "",
            "Train all, or convert the model first.",
        )


def make_optimizer(model: PreTrainedModel, train: Train, device_type: str) -> torch.optim.Optimizer:
    """AdamW over what is trained. Groups carry their `peak` learning rate.

    Weight decay on matrices only: norms and biases have no scale to decay.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for _, parameter, part in parts_of(model):
        if parameter.requires_grad:
            decay = train.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((peak_rate(part, train), decay), []).append(parameter)
    fused = device_type in ("cpu", "cuda")  # one pass over the parameters instead of a dozen
    return torch.optim.AdamW(
        [{"params": params, "peak": peak, "weight_decay": decay} for (peak, decay), params in groups.items()],
        lr=next(iter(groups))[0], betas=train.betas, fused=fused,
    )  # fmt: skip


def peak_rate(part: Part, train: Train) -> float:
    """The peak learning rate of a part: its own, or attention's for `shared`, or the one for all."""
    rates, rate = train.learning_rates, train.learning_rate
    assert rate != "auto", "with_rates() makes it a number"
    fallback = rates.get("attention", rate) if part == "shared" else rate
    return rates.get(part, fallback)
