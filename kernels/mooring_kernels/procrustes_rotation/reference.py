"""Orthogonal Procrustes by singular value decomposition, the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels.procrustes_rotation.covariance import cross_covariance, with_ridge


def procrustes_rotation(
    frozen: Tensor, tuned: Tensor, labels: Tensor, ridge: float, centred: bool, det_fix: bool
) -> Tensor:
    """The orthogonal polar factor ``U V^T`` of ``S^T + ridge |S|_2 I = U Sigma V^T``.

    ``det_fix`` turns the direction of the smallest singular value round where the determinant is -1. Its sign
    is taken from LU factors: the determinant itself underflows at D = 2048 in fp32.
    """
    transposed, usable = cross_covariance(frozen, tuned, labels, centred)
    norm = torch.linalg.matrix_norm(transposed, 2) if ridge else transposed.new_zeros(())
    left, _, right = torch.linalg.svd(with_ridge(transposed, ridge, norm, usable))
    rotation = left @ right
    if det_fix:
        sign = torch.linalg.slogdet(rotation).sign
        rotation = rotation + (sign - 1) * torch.outer(left[:, -1], right[-1])
    return rotation
