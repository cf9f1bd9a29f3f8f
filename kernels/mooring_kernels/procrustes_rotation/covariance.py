"""What both solvers start from: the masked cross-covariance of the two banks."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels.runtime.dispatch import working_dtype

# The estimate grows towards |M|_2 from below, and is within 1 / (4 e * iterations), 0.3 %, of it whatever the
# spectrum once the start has a fair share of the leading vector. It sets nothing but the strength of the ridge.
POWER_ITERATIONS = 40


def cross_covariance(frozen: Tensor, tuned: Tensor, labels: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """``S^T = Y^T X`` over the rows with a label, and whether it is more than rounding error.

    X and Y are the frozen and the tuned rows, less their means if ``centred``. Equal rows (one row, say) have a
    covariance of zero that rounding turns into noise, whose polar factor would be an arbitrary rotation.

    Returns:
        S^T [D, D] in the working dtype, divided by its largest entry: the scale cancels in R, and powers of the
        norm stay in range; 0-d bool.
    """
    dtype = working_dtype(frozen, tuned)
    valid = (labels >= 0)[:, None]
    # Selected, not multiplied by zero: an empty slot may hold anything, NaN included.
    x = torch.where(valid, frozen.to(dtype), 0)
    y = torch.where(valid, tuned.to(dtype), 0)
    size = torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y)
    if centred:
        count = valid.sum().clamp_min(1)
        x = torch.where(valid, x - x.sum(0) / count, 0)
        y = torch.where(valid, y - y.sum(0) / count, 0)
    transposed = y.T @ x
    # Centring leaves errors of a few eps per element in each factor, a product of them in S.
    noise = (16 * torch.finfo(dtype).eps) ** 2 * size
    usable = torch.linalg.matrix_norm(transposed) > noise
    return transposed / transposed.abs().amax().clamp_min(torch.finfo(dtype).tiny), usable


def spectral_norm(matrix: Tensor) -> Tensor:
    """``|M|_2`` by power iteration on ``M^T M`` from a fixed start: a 0-d tensor, without a host sync."""
    width = matrix.shape[0]
    # Unrelated to the axes and to any pattern in the data; a random start would need a generator.
    vector = torch.cos(torch.arange(width, dtype=matrix.dtype, device=matrix.device) ** 2)
    tiny = torch.finfo(matrix.dtype).tiny
    norm = vector.new_zeros(())
    for _ in range(POWER_ITERATIONS):
        image = matrix @ (vector / torch.linalg.vector_norm(vector).clamp_min(tiny))
        norm = torch.linalg.vector_norm(image)
        vector = matrix.T @ image
    return norm


def with_ridge(transposed: Tensor, ridge: float, norm: Tensor, usable: Tensor) -> Tensor:
    """``S^T + ridge * norm * I``, or I where S is nothing but rounding error."""
    eye = torch.eye(transposed.shape[0], dtype=transposed.dtype, device=transposed.device)
    return torch.where(usable, transposed + ridge * norm * eye, eye)
