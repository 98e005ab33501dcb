"""Ridge regressions that pull towards known weights instead of zero. Pure linear algebra, float64."""

import torch
from torch import Tensor

from ..errors import NotFiniteError


def ridge_towards(weight: Tensor, gram: Tensor, cross: Tensor, strength: float | Tensor) -> Tensor:
    """argmin_W E|y - W x|^2 + |lam (W - weight)|^2, with lam^2 = strength times the mean diagonal of E[x x^T].

    Args:
        weight: [outputs, inputs], what W falls back to where the data say nothing.
        gram: [inputs, inputs], E[x x^T].
        cross: [inputs, outputs], E[x y^T].
        strength: dimensionless; one for all outputs, or one for each.

    Shrinking towards `weight` makes the regression exact where nothing needs to change: if y = weight x, W = weight.
    Raises NotFiniteError if the data are not finite.
    """
    if not (gram.isfinite().all() and cross.isfinite().all()):
        raise NotFiniteError(
            "The model's activations on the calibration text are not finite",
            why="Its weights hold inf or nan, or it overflows on this text.",
            fix="Check that the source model generates text; --init mean looks at no activations.",
        )
    penalty = strength * gram.diagonal().mean().clamp_min(1e-30)
    missing = cross - gram @ weight.T
    if isinstance(penalty, Tensor) and penalty.dim():
        power, vectors = torch.linalg.eigh(gram)
        change = vectors @ ((vectors.T @ missing) / (power.clamp_min(0)[:, None] + penalty))
    else:
        regular = gram + penalty * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        change = torch.cholesky_solve(missing, torch.linalg.cholesky(regular))
    return weight + change.T
