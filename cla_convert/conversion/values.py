"""Shared values, and keys without RoPE: any change of basis is free. Pure linear algebra, float64.

A head's values only ever pass through its slices of W_O, so layer b may read v_b ~ A_b^T s of a shared s, with A_b^T
folded into W_O. Keys of channels without RoPE (partial rotary, NoPE layers) only ever meet their queries, so the same
holds with A_b folded into W_Q. The best s is a reduced-rank regression (Izenman 1975) of all members' values at once,
in the metric in which the model sees them. VFOLD (2026) aligns the values of two layers in the same freedom.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .keys import fit_rotary


@dataclass(frozen=True)
class BasisFit:
    """One shared head of D channels for n members."""

    basis: Tensor
    """[n * D, D]: the shared vector is s = basis^T [v_1; ...; v_n]."""
    maps: Tensor
    """[n, D, D]: v_b ~ maps_b^T s."""
    captured: float
    """Energy, in the metric, that the shared vector reproduces."""
    total: float
    """Energy of all members in the metric."""

    def to(self, device: torch.device) -> "BasisFit":
        """The same on another device."""
        return replace(self, basis=self.basis.to(device), maps=self.maps.to(device))


def square_roots(metrics: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of [..., D, D] and their inverses; what a metric barely sees is floored, not dropped."""
    power, vectors = torch.linalg.eigh(metrics)
    floor = 1e-6 * power.amax(-1, keepdim=True).clamp_min(1e-30) if power.shape[-1] else power
    root = power.maximum(floor).sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def fit_basis(gram: Tensor, roots: Sequence[Tensor], inverses: Sequence[Tensor]) -> BasisFit:
    """The D-dimensional s that serves all members best.

    Args:
        gram: [n * D, n * D], E[v v^T] of the members' stacked vectors.
        roots: n matrices [D, D], M_b^1/2: an error e in v_b costs e^T M_b e. Values: M_b = sum over the group's query
            heads of W_O^T W_O. Free keys: M_b = E[q q^T] summed over them.
        inverses: their inverses.

    With U the top D principal directions of the stacked M_b^1/2 v_b: s = U^T M^1/2 v and v_b ~ M_b^-1/2 U_b s. s is
    rescaled to the first member's root mean square, unless that is 0: of a head that was pruned.
    """
    width = roots[0].shape[0]
    root = torch.block_diag(*roots)
    power, vectors = torch.linalg.eigh(root @ gram @ root)
    top = vectors[:, -width:]
    top = top * top.gather(0, top.abs().argmax(0, keepdim=True)).sign()  # else rounding decides on the sign
    basis = root @ top
    maps = torch.stack([(inverse @ part).T for inverse, part in zip(inverses, top.split(width), strict=True)])
    size = (gram[:width, :width].trace() / (basis.T @ gram @ basis).trace().clamp_min(1e-30)).sqrt()
    size = size.where(size > 0, torch.ones_like(size))
    return BasisFit(basis * size, maps / size, power[-width:].sum().item(), power.sum().item())


def channel_energy(roots: Tensor) -> Tensor:
    """What an error in each channel costs by itself, as a root: [..., D] from square roots [..., D, D] of a metric."""
    return roots.square().sum(-1).sqrt()


def fit_channels(gram: Tensor, roots: Sequence[Tensor], inverses: Sequence[Tensor]) -> BasisFit:
    """As `fit_basis`, where a gate on each channel of a head stands between its values and W_O.

    Of all changes of basis only sizes of channels pass a gate: v_bc ~ scale_bc s_c, as for a rotary pair (`fit_rotary`)
    but real.
    """
    count, width = len(roots), roots[0].shape[0]
    own = gram.view(count, width, count, width).diagonal(dim1=1, dim2=3)
    fit = fit_rotary(own.permute(2, 0, 1), torch.stack([channel_energy(root) for root in roots], 1))
    basis = torch.cat([part.diag() for part in fit.mix.T])
    return BasisFit(basis, torch.stack([part.diag() for part in fit.scale.T]), fit.captured, fit.total)


def fold_outputs(columns: Tensor, member_map: Tensor) -> Tensor:
    """Columns [hidden, D] of W_O, one query head's: W_O v_b = (W_O maps_b^T) s."""
    return columns @ member_map.T


def fold_free_queries(rows: Tensor, member_map: Tensor) -> Tensor:
    """Rows [D, columns] of W_Q without RoPE: q^T k_b = (maps_b q)^T s."""
    return member_map @ rows
