"""Orthogonal polar factor by scaled Newton steps and one rational function. For the CPU: it reads norms back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mooring_kernels.procrustes_rotation import zolotarev
from mooring_kernels.procrustes_rotation.blocks import definite_inverse_, gram, inverse_transpose
from mooring_kernels.procrustes_rotation.covariance import centred_rows, scaled, spectral_norm, with_ridge

# An inverse of a general matrix costs as much as two of definite ones (2.7 and 1.3 D^3 at D = 2048).
NEWTON_COST = 2.0
# x^2 is what the poles see, and costs the square of kappa in digits: 2 of 7 at 10.
LARGEST_KAPPA = 10.0
# Of fp32 products of D = 2048 |R^T R - I|_2 is some 50 eps; the rational function may add twice its own error.
RATIONAL_ERROR, DEPARTURE = 12, 128
# Norms are estimated from below, by a few percent at most where values cluster.
MARGIN = 1.05
# Banks of up to D / 3 rows are solved in the space of their rows (measured at D = 768 and 2048: 0.7 of the time at
# D / 3, 0.35 at D / 4, 0.13 at D / 8); beyond it the QR decomposition costs what it saves.
SPAN_SHARE = 3


def procrustes_rotation(frozen: Tensor, tuned: Tensor, labels: Tensor, ridge: float, centred: bool) -> Tensor:
    """As ``reference.procrustes_rotation``, for ``ridge > 0`` and without the determinant's correction.

    S^T = Y^T X is nothing outside the joint span of the rows, of orthonormal basis Q [D, 2 K]: with few rows
    ``R = I + Q (polar(Q^T S^T Q + eps I) - I) Q^T``, exactly.
    """
    x, y, noise = centred_rows(frozen, tuned, labels, centred)
    rows, width = x.shape
    basis = None
    if 0 < SPAN_SHARE * rows <= width:
        basis, _ = torch.linalg.qr(torch.cat([x, y]).T)
        x, y = x @ basis, y @ basis
    transposed, usable = scaled(y.T @ x, noise)
    if not bool(usable):
        return torch.eye(width, dtype=x.dtype)
    norm = spectral_norm(transposed)
    factor = polar_factor(with_ridge(transposed, ridge, norm, usable), (1 + ridge) * float(norm))
    if basis is None:
        return factor
    factor.diagonal().sub_(1)
    rotation = (basis @ factor) @ basis.T
    rotation.diagonal().add_(1)
    return rotation


def polar_factor(matrix: Tensor, norm: float) -> Tensor:
    """The orthogonal factor of a nonsingular matrix [D, D], whatever its condition, with ``|M|_2`` about ``norm``.

    Scaled Newton steps ``X <- (X / m + m X^-T) / 2``, ``m^2 = |X| / |X^-1|``, take the square root of the condition
    number, and half of it, until Zolotarev's function of few poles is 1 to rounding on what is left; its inverses are
    of positive definite matrices, half as dear and without pivots. A last look at ``R^T R - I`` adds a step where an
    estimated norm was wrong.
    """
    eps = torch.finfo(matrix.dtype).eps
    x = matrix
    upper = MARGIN * norm
    for _ in range(12):  # 5 take 1e16 to 1; what is not finite never ends
        inverse = inverse_transpose(x)
        kappa = max(upper * MARGIN * float(spectral_norm(inverse, 12)), 1.0)
        if not math.isfinite(kappa):
            return torch.full_like(x, math.nan)
        lower = upper / kappa
        scale = math.sqrt(upper * lower)
        x = x.div(2 * scale).add_(inverse, alpha=scale / 2)
        upper = _after_newton(kappa)  # and 1 the least
        if upper <= LARGEST_KAPPA:
            further = NEWTON_COST + _poles(_after_newton(upper), eps)
            if _poles(upper, eps) <= further:
                break
    x = _rational(x / upper, upper, _poles(upper, eps))
    for _ in range(12):
        if float(_departure(x)) < DEPARTURE * eps:
            break
        x = (x + inverse_transpose(x)) / 2
    return x


def _after_newton(kappa: float) -> float:
    """Condition number after the best scaled step: ``(x + 1 / x) / 2`` on ``[kappa^-1/2, kappa^1/2]``."""
    return (math.sqrt(kappa) + 1 / math.sqrt(kappa)) / 2


def _poles(kappa: float, eps: float) -> int:
    """Poles that take ``[1/kappa, 1]`` to 1 within rounding. What they leave is in |R^T R - I|, not in directions."""
    poles = 1
    while zolotarev.error(kappa, poles) > RATIONAL_ERROR * eps:
        poles += 1
    return poles


def _rational(x: Tensor, kappa: float, poles: int) -> Tensor:
    constant, terms = zolotarev.partial_fractions(max(kappa, 1 + 1e-6), poles)
    square = gram(x)
    total = torch.zeros_like(square)
    total.fill_diagonal_(constant)
    for shift, weight in terms:
        shifted = square.clone()
        shifted.diagonal().add_(shift)
        total.add_(definite_inverse_(shifted), alpha=weight)
    return x @ total


def _departure(x: Tensor) -> Tensor:
    """``|X^T X - I|_2``, by a few steps of power iteration."""
    vector = torch.sin(torch.arange(1, x.shape[0] + 1, dtype=x.dtype) ** 2)
    norm = vector.new_zeros(())
    for _ in range(4):
        vector = vector / torch.linalg.vector_norm(vector).clamp_min(torch.finfo(x.dtype).tiny)
        vector = x.T @ (x @ vector) - vector
        norm = torch.linalg.vector_norm(vector)
    return norm
