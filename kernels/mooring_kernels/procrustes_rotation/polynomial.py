"""Orthogonal polar factor by matrix products alone: no SVD, no wait for the device, one CUDA graph."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mooring_kernels.procrustes_rotation.covariance import cross_covariance, spectral_norm, with_ridge

# x <- a x + b x^3 + c x^5 on the singular values, each step the minimax approximation of 1 on the interval that the
# steps before it leave of [2e-7, 1] (Amsel et al., "The Polar Express", arXiv 2505.16932). Computed by Remez exchange
# with lower ends cushioned at 0.02407 of the upper, and upper ends widened by 1 %: at the very end the slope is 12,
# and a rounding error beyond it would grow from step to step. The first takes [4e-7, 2].
SCHEDULE = (
    (4.11964697, -2.8746509, 0.51653755),
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
REACH = 2e-7
# Smallest singular value over the ridge's share that the schedule is made for. Where the banks drift strongly,
# S^T + eps I has values below eps: |1 + e^it| eps for one that S^T turns by t. Of 2048 angles drawn evenly the one next
# to pi gives 1.5e-3.
BELOW_RIDGE = 2e-4


def schedule(ridge: float) -> tuple[tuple[float, float, float], ...]:
    """Steps that take singular values from ``BELOW_RIDGE * ridge`` of the largest to 1: 14 for ridge 1e-3.

    A factor of 4.12 in the ridge is one step: the first maps the bottom of the interval on the next one's.
    """
    first = SCHEDULE[0]
    missing = math.ceil(math.log(REACH / (BELOW_RIDGE * ridge)) / math.log(first[0]) - 1e-9)
    # Beyond 10 further steps values lie under 1e-13: fp32 noise lifts them over that.
    return (first,) * min(missing, 10) + SCHEDULE if missing > 0 else SCHEDULE[min(-missing, 7) :]


def procrustes_rotation(frozen: Tensor, tuned: Tensor, labels: Tensor, ridge: float, centred: bool) -> Tensor:
    """As ``reference.procrustes_rotation``, for ``ridge > 0`` and without the determinant's correction."""
    transposed, usable = cross_covariance(frozen, tuned, labels, centred)
    return polar_factor(with_ridge(transposed, ridge, spectral_norm(transposed), usable), ridge)


def polar_factor(matrix: Tensor, ridge: float = 1e-3) -> Tensor:
    """The orthogonal factor of a matrix [D, D] with entries of order one, as ``schedule(ridge)`` reaches."""
    x = matrix
    for step, (a, b, c) in enumerate(schedule(ridge)):
        gram = x.T @ x
        square = gram @ gram
        if step == 0:
            # |G^2|_F^(1/4) is never below |X|_2 (nor above it by more than D^(1/8)), and costs nothing here.
            bound = torch.linalg.matrix_norm(square).sqrt() / 4
            x, gram, square = x / bound.sqrt(), gram / bound, square / bound**2
        x = a * x + x @ (b * gram + c * square)
    return x
