"""Shared keys: what RoPE leaves free, and the best shared key channel under it. Pure linear algebra, float64.

RoPE turns channels f and f + F of a head (F = half the rotary channels) as one complex number k_f by exp(i t theta_f)
at position t. The linear maps of a head that commute with it at every position are exactly one complex scalar per
frequency, and a logit is Re sum_f conj(q_f) k_f. So the key of layer b may be any complex multiple of a shared channel,
k_bf ~ scale_bf s_f, if its query turns into conj(scale_bf) q_f. CommVQ (arXiv 2506.18879) uses the same scalars in
codebooks; RoRoPE (TransMLA, arXiv 2502.07864) the real rotations across heads.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryFit:
    """One shared KV head's keys for n members and F frequencies."""

    mix: Tensor
    """Complex [F, n]: the shared channel is s_f = sum_b mix_fb k_bf."""
    scale: Tensor
    """Complex [F, n]: k_bf ~ scale_fb s_f."""
    captured: float
    """Query-weighted key energy that the shared channel reproduces."""
    total: float
    """Query-weighted key energy of all members."""

    def to(self, device: torch.device) -> "RotaryFit":
        """The same on another device."""
        return replace(self, mix=self.mix.to(device), scale=self.scale.to(device))


def rotary_gram(gram: Tensor, rotary_dim: int) -> Tensor:
    """Complex second moments E[conj(k_mf) k_nf], [F, m, m], from real ones of whole heads, [m, m, D, D]."""
    half = rotary_dim // 2
    real = torch.diagonal(gram[..., :half, :half], dim1=2, dim2=3)
    imag = torch.diagonal(gram[..., half:rotary_dim, half:rotary_dim], dim1=2, dim2=3)
    cross = torch.diagonal(gram[..., :half, half:rotary_dim], dim1=2, dim2=3)
    return torch.complex(real + imag, cross - cross.transpose(0, 1)).permute(2, 0, 1)


def fit_rotary(gram: Tensor, energy: Tensor) -> RotaryFit:
    """Rank-1 complex regression: the channel s_f that serves all members best, weighted by what their queries see.

    Args:
        gram: complex [F, n, n], E[conj(k_mf) k_nf] of the members' keys.
        energy: real [F, n], sqrt(E|q_bf|^2) summed over the member's query heads: an error in k_bf costs that much.

    The weighted keys energy_b k_b have the Hermitian Gram matrix D gram D; its top eigenvector u gives the best rank-1
    approximation (Eckart-Young), s = sum_b energy_b u_b k_b and scale_b = conj(u_b) / energy_b. The scales are
    normalised to mean square 1, which keeps the keys near their old size.
    With F = 0 (no RoPE) the fit is empty.
    """
    if not energy.numel():
        return RotaryFit(gram.new_empty(energy.shape), gram.new_empty(energy.shape), 0.0, 0.0)
    weight = energy.clamp_min(1e-6 * energy.max().clamp_min(1e-30))
    power, vectors = torch.linalg.eigh(weight[:, :, None] * gram * weight[:, None, :])
    top = vectors[..., -1]
    phase = torch.sgn(top[..., :1])  # an eigenvector has any: here the first member's is 1, whatever rounding did
    top = top * phase.where(phase != 0, torch.ones_like(phase)).conj()
    scale = top.conj() / weight
    size = scale.abs().square().mean(1, keepdim=True).sqrt()
    return RotaryFit(weight * top * size, scale / size, power[:, -1].sum().item(), power.sum().item())


def mix_rotary(rows: Tensor, factor: Tensor) -> Tensor:
    """Multiply complex channels by `factor`, complex [F]: rows [2F, columns] of a projection in, the same out.

    Linear in the input, so it acts on weights: channel f is row f + i row (f + F).
    """
    half = rows.shape[0] // 2
    product = torch.complex(rows[:half], rows[half:]) * factor[:, None]
    return torch.cat([product.real, product.imag])


def fold_queries(rows: Tensor, scale: Tensor) -> Tensor:
    """Rows [2F, columns] of W_Q for a member whose keys are scale_f s_f: q_f <- conj(scale_f) q_f."""
    return mix_rotary(rows, scale.conj())
