"""A layer's attention weights as the linear maps that calibrated pooling works on, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import InputError
from .blocks import Block, gain_of
from .group_fit import HeadShape, Projections
from .norms import Norm, split


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's attention: float64 projections, biases as the last column of q, k and v, and norms if it has some.

    The channels of a rotary pair lie in the two halves of the rotary part, whatever the family's own order.
    """

    projections: Projections
    norms: dict[str, Norm]
    """Of `q` and `k`; empty in most families."""

    @classmethod
    def of(cls, block: Block, weights: Mapping[str, Tensor]) -> "AttentionWeights":
        """From a layer's weights by name; `block` was built from them."""
        prefix = f"{block.family.attention}."
        parts = [weights[f"{prefix}{name}_proj.weight"].double() for name in "qkv"]
        if has_biases(weights, prefix):
            biases = (weights[f"{prefix}{name}_proj.bias"].double() for name in "qkv")
            parts = [torch.cat([part, bias[:, None]], 1) for part, bias in zip(parts, biases, strict=True)]
        if block.family.gated:
            parts[0], _ = _queries_and_gates(parts[0], block.shape.head_dim)
        modules = {name: block.norm(name) for name in "qk"}
        gains = {name: gain_of(module)[0].double() for name, module in modules.items() if module is not None}
        order = block.channel_order
        norms = {name: Norm(_per_head(gain, order)) for name, gain in gains.items()}
        q, k, v = _per_head(parts[0], order), _per_head(parts[1], order), parts[2]
        return cls(Projections(q, k, v, weights[block.family.output_weight].double()), norms)

    def linear(self, second: Tensor) -> Projections:
        """Stand-ins without norms, for inputs x with E[x x^T] = `second`."""
        maps = {name: norm.linear(getattr(self.projections, name), second) for name, norm in self.norms.items()}
        return replace(self.projections, **maps)

    def seen(self, second: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Squares [n, rows] of what the norms see of `x` [n, p]; of mean 1 over tokens and a norm's rows."""
        weights = {name: getattr(self.projections, name) for name in self.norms}
        return {n: (self.norms[n].scale(w, second) * (x @ w.T)).square() for n, w in weights.items()}

    def with_linear(
        self, wanted: Projections, shape: HeadShape, x: Tensor, seen: Mapping[str, Tensor]
    ) -> tuple["AttentionWeights", list[float]]:
        """Weights and norms that give about the stand-ins `wanted`, and by how much they miss the right length.

        Args:
            wanted: what pooling found.
            shape: sizes.
            x: [n, p], inputs.
            seen: of each norm that the layer keeps, `q` and, of an owner, `k`: what it should see, see `split`.
        """
        width = lambda name: min(len(self.norms[name].gain), len(getattr(wanted, name)))  # noqa: E731 - of all heads
        splits = {
            name: split(getattr(wanted, name), x, squares, width(name), shape.head_dim, shape.rotary_dim)
            for name, squares in seen.items()
        }
        maps = {name: weight for name, (weight, _, _) in splits.items()}
        norms = {name: norm for name, (_, norm, _) in splits.items()}
        return AttentionWeights(replace(wanted, **maps), norms), [error for _, _, error in splits.values()]

    def tensors(self, block: Block, weights: Mapping[str, Tensor], order: Sequence[int]) -> dict[str, Tensor]:
        """The inverse of `of`, float32, by name; gates and sinks of query heads go with their KV heads into `order`."""
        prefix = f"{block.family.attention}."
        tensors = {block.family.output_weight: self.projections.o}
        own_order = block.channel_order.argsort()
        for name in "qkv":
            weight = getattr(self.projections, name)
            weight = weight if name == "v" else _per_head(weight, own_order)
            if name == "q" and block.family.gated:
                weight = _with_gates(weight, weights, block, order)
            if has_biases(weights, prefix):
                weight, tensors[f"{prefix}{name}_proj.bias"] = weight[:, :-1], weight[:, -1]
            tensors[f"{prefix}{name}_proj.weight"] = weight
        for name, norm in self.norms.items():
            module = block.norm(name)
            assert module is not None, f"the block has no norm of {name}"
            gain = _per_head(norm.gain, own_order)
            tensors[f"{prefix}{block.family.norm_name(name)}.weight"] = gain - gain_of(module)[1]
        if block.family.sinks:
            name = f"{prefix}sinks"
            tensors[name] = _reordered(weights[name][None], order)[0]
        return {name: tensor.to(block.device, torch.float32).contiguous() for name, tensor in tensors.items()}


def with_norms(
    sources: Sequence[AttentionWeights],
    wanted: Sequence[Projections],
    permutations: Sequence[Sequence[int]],
    seconds: Sequence[Tensor],
    own: Tensor,
    inputs: Sequence[Tensor],
    shape: HeadShape,
) -> tuple[list[AttentionWeights], float]:
    """A group's weights and norms from the stand-ins that it wants, and how far lengths are off on average, in nats.

    Norms should see what they saw in the source; that of the shared keys what those of the heads that became one saw on
    average.

    Args:
        sources: the members, owner first.
        wanted: their new stand-ins.
        permutations: per member, its KV heads in the order of the shared ones that they sit on.
        seconds: second moments of their inputs in the source.
        own: [n, p], inputs that the owner will have.
        inputs: [n, p] each, inputs that the members have in the source, of the same tokens.
        shape: sizes.
    """
    seen = [
        {name: _reordered(square, order) for name, square in source.seen(second, x).items()}
        for source, second, x, order in zip(sources, seconds, inputs, permutations, strict=True)
    ]
    keys = torch.stack([member.pop("k") for member in seen]).mean(0)
    seen[0]["k"] = keys.unflatten(1, (len(wanted[0].k) // shape.head_dim, -1, shape.head_dim)).mean(2).flatten(1)
    pairs = [
        source.with_linear(projections, shape, x, squares)
        for source, projections, x, squares in zip(sources, wanted, [own, *inputs[1:]], seen, strict=True)
    ]
    errors = [error for _, found in pairs for error in found]
    return [weights for weights, _ in pairs], sum(errors) / len(errors)


def _per_head(rows: Tensor, order: Tensor) -> Tensor:
    """Rows (or gains) of one head or several, those of each head in another order."""
    return rows.unflatten(0, (-1, len(order)))[:, order.to(rows.device)].flatten(0, 1)


def _reordered(rows: Tensor, order: Sequence[int]) -> Tensor:
    """Columns [n, heads * D] of query or KV heads in the order of the shared KV heads."""
    return rows.unflatten(1, (len(order), -1))[:, list(order)].flatten(1)


def _queries_and_gates(rows: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Rows of the queries, and those of the gates, from a projection that has both head by head."""
    queries, gates = rows.unflatten(0, (-1, 2, head_dim)).unbind(1)
    return queries.flatten(0, 1), gates.flatten(0, 1)


def _with_gates(queries: Tensor, weights: Mapping[str, Tensor], block: Block, order: Sequence[int]) -> Tensor:
    """Rows of queries [heads * D, p], and between them those of the layer's gates."""
    prefix, dim = f"{block.family.attention}.q_proj.", block.shape.head_dim
    stored = weights[f"{prefix}weight"]
    if f"{prefix}bias" in weights:
        stored = torch.cat([stored, weights[f"{prefix}bias"][:, None]], 1)
    _, gates = _queries_and_gates(stored, dim)
    heads = [rows.unflatten(0, (-1, dim)) for rows in (queries, _reordered(gates.T, order).T.to(queries))]
    return torch.stack(heads, 1).flatten(0, 2)


def has_biases(weights: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether q, k and v have biases. Raises InputError if only some do."""
    found = {f"{prefix}{name}_proj.bias" in weights for name in "qkv"}
    if len(found) > 1:
        raise InputError(
            "--init calibrated needs biases on all of q_proj, k_proj and v_proj, or on none",
            fix="Use --init mean.",
        )
    return found.pop()
