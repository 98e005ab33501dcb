"""Peak learning rates that `auto` comes to, from the size of the weights before training."""

from math import isfinite, sqrt

import torch
from transformers import PreTrainedModel

from ..errors import InputError
from ..recipe import Train
from .optimizer import parts_of
from .schedule import Budget
from .sharded import whole

SHARE = 0.005
"""Of the root mean square of attention's matrices, what Adam moves an element in a step at the peak."""
REST = 0.2
"""The share of all other matrices, of that: conversion has not changed them (RADLADS, arXiv 2505.03005, likewise)."""
SETTLED = 100
"""Optimiser steps from which on the rate does not depend on their number."""


def with_rates(train: Train, model: PreTrainedModel) -> Train:
    """`train` with numbers for `learning_rate: auto`; the evidence is in docs/uptraining.md.

    An Adam step moves every element by about the rate, whatever its size. So the rate has to follow the size of the
    weights, which differs between families far more than their widths do: SmolLM2's are five times Gemma 3's.
    Few steps get less, by the square root: Adam's first ones are mostly noise, and too few follow to mend it.

    All processes of a sharded model must ask.

    Raises:
        InputError: the weights have no size that a rate could follow.
    """
    if train.learning_rate != "auto":
        return train
    few = sqrt(min(1.0, (Budget.of(train).steps or SETTLED) / SETTLED))
    attention, rest = (few * SHARE * size for size in _sizes(model))
    rest *= REST if train.needs_teacher else 1.0  # without one, what is new to the model is new to all of it
    rates = {"attention": _two_digits(attention)} | train.learning_rates
    return train.model_copy(update={"learning_rate": _two_digits(rest), "learning_rates": rates})


def _sizes(model: PreTrainedModel) -> tuple[float, float]:
    """Root mean square of attention's matrices, and of all others in the layers; where one is 0, the other's.

    Embeddings and output head do not count: rows of a table have the size that their tokens need.
    """
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    left_out = {id(table.weight) for table in tables if table is not None}
    squares, counts = {"attention": 0.0, "other": 0.0}, {"attention": 0, "other": 0}
    for _, parameter, part in parts_of(model):
        if parameter.ndim >= 2 and parameter.numel() and id(parameter) not in left_out:
            kind = "other" if part == "other" else "attention"
            norm = torch.linalg.vector_norm(parameter.detach(), dtype=torch.float32)
            squares[kind] += whole(norm).item() ** 2
            counts[kind] += parameter.numel()
    attention, other = (sqrt(squares[kind] / max(1, counts[kind])) for kind in squares)
    if not isfinite(attention + other) or not attention + other:
        raise InputError(
            "train.learning_rate=auto finds no rate for this model",
            f"It follows the size of the weights, and they are {'not finite' if attention + other else 'all zero'}.",
            "Check the model's weights, or name a rate.",
        )
    return attention or other, other or attention


def _two_digits(rate: float) -> float:
    return float(f"{rate:.2g}")
