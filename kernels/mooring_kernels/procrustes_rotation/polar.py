"""Orthogonal Procrustes by matrix products alone: no SVD, no wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels.procrustes_rotation.covariance import cross_covariance, spectral_norm, with_ridge

# x <- a x + b x^3 + c x^5 on the singular values, each step the minimax approximation of 1 on the interval
# that the steps before it leave of [2e-7, 1] (Amsel et al., "The Polar Express", arXiv 2505.16932). 2e-7 is
# where fp32 noise begins: what lies below is not data. Computed by Remez exchange with lower ends cushioned at
# 0.024 of the upper, and upper ends widened by 1 %: at the very end the slope is 12, and a rounding error
# beyond it would grow from step to step.
SCHEDULE = (
    (8.23929394, -22.9972072, 16.5292017),
    (4.11963978, -2.87465062, 0.516538352),
    (4.11960674, -2.87464235, 0.516539521),
    (4.11947067, -2.87460827, 0.516544337),
    (4.11891019, -2.87446793, 0.516564184),
    (4.11660336, -2.87389067, 0.516646079),
    (4.10713593, -2.8715274, 0.516985701),
    (4.06873545, -2.86204136, 0.518422732),
    (3.92025073, -2.82704101, 0.524979146),
    (3.32887732, -2.44999306, 0.490180123),
    (2.32631758, -1.66830583, 0.406741187),
    (1.88688524, -1.2533738, 0.366921278),
    # From here all lie in [0.85, 1.15]: the Newton-Schulz step of order three, twice.
    (1.875, -1.25, 0.375),
    (1.875, -1.25, 0.375),
)


def procrustes_rotation(frozen: Tensor, tuned: Tensor, labels: Tensor, ridge: float, centred: bool) -> Tensor:
    """As ``reference.procrustes_rotation``, for ``ridge > 0`` and without the determinant's correction."""
    transposed, usable = cross_covariance(frozen, tuned, labels, centred)
    return polar_factor(with_ridge(transposed, ridge, spectral_norm(transposed), usable))


def polar_factor(matrix: Tensor) -> Tensor:
    """The orthogonal factor of a matrix [D, D] with entries of order one and singular values within 1 : 2e-7."""
    x = matrix
    for step, (a, b, c) in enumerate(SCHEDULE):
        gram = x.T @ x
        square = gram @ gram
        if step == 0:
            # |G^2|_F^(1/4) is never below |X|_2 (nor above it by more than D^(1/8)), and costs nothing here.
            bound = torch.linalg.matrix_norm(square).sqrt()
            x, gram, square = x / bound.sqrt(), gram / bound, square / bound**2
        x = a * x + x @ (b * gram + c * square)
    return x
