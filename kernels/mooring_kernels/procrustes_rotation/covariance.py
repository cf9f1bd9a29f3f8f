"""What all solvers start from: the masked cross-covariance of the two banks, its norm, the ridge.

S is computed anew at each refresh. Kept up to date with every push it would cost 4 B T D^2 per refresh against
2 K D^2, a gain for T < K / (2 B) only: 1.6 at the default T = 10, B = 64, K = 2048, of the 15 % that the product takes
in the fastest solver (newton, D = 2048), for state that a resume must carry and that drifts by 5e-5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels.runtime.dispatch import working_dtype

# Steps of Lanczos. The error falls with the square of their number at worst: 2.5e-5 on a bank of random rows, whose
# spectrum has no gap at its top (40 steps of power iteration, more products, are off by 1.2e-2 there).
LANCZOS_STEPS = 32


def centred_rows(
    frozen: Tensor, tuned: Tensor, labels: Tensor, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """X, Y [K, D] in the working dtype, less their means if ``centred``, masked rows zero; and a norm.

    Returns:
        X, Y, and 0-d: ``|S|_F`` below it is rounding error. Equal rows (one row, say) have a covariance of zero that
        rounding turns into noise, whose polar factor would be an arbitrary rotation.
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
    # Centring leaves errors of a few eps per element in each factor, a product of them in S.
    return x, y, (16 * torch.finfo(dtype).eps) ** 2 * size


def cross_covariance(frozen: Tensor, tuned: Tensor, labels: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """``S^T = Y^T X`` over the rows with a label, and whether it is more than rounding error.

    Returns:
        S^T [D, D] in the working dtype, divided by its largest entry: the scale cancels in R, and powers of the
        norm stay in range; 0-d bool.
    """
    x, y, noise = centred_rows(frozen, tuned, labels, centred)
    return scaled(y.T @ x, noise)


def scaled(transposed: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix over its largest entry, and whether it is more than ``noise``."""
    usable = torch.linalg.matrix_norm(transposed) > noise
    return transposed / transposed.abs().amax().clamp_min(torch.finfo(transposed.dtype).tiny), usable


def spectral_norm(matrix: Tensor, steps: int = LANCZOS_STEPS) -> Tensor:
    """``|M|_2`` from below, by Golub-Kahan-Lanczos from a fixed start: a 0-d tensor, without a host sync."""
    width = matrix.shape[0]
    steps = min(steps, width)
    tiny = torch.finfo(matrix.dtype).tiny
    # Unrelated to the axes and to any pattern in the data; a random start would need a generator.
    right = torch.cos(torch.arange(width, dtype=matrix.dtype, device=matrix.device) ** 2)
    right = right / torch.linalg.vector_norm(right)
    left, beta = torch.zeros_like(right), right.new_zeros(())
    diagonal, above = [], []
    for _ in range(steps):
        left = matrix @ right - beta * left
        alpha = torch.linalg.vector_norm(left)
        left = left / alpha.clamp_min(tiny)
        right = matrix.T @ left - alpha * right
        beta = torch.linalg.vector_norm(right)
        right = right / beta.clamp_min(tiny)
        diagonal.append(alpha)
        above.append(beta)
    small = torch.diag(torch.stack(diagonal))
    if steps > 1:
        small = small + torch.diag(torch.stack(above[:-1]), 1)
    return _small_norm(small)


def _small_norm(matrix: Tensor) -> Tensor:
    """``|B|_2`` of a small matrix: the Gram matrix to the power 2^14, since an SVD on a GPU waits for the device."""
    square = matrix.T @ matrix
    tiny = torch.finfo(matrix.dtype).tiny
    power = square
    for _ in range(14):
        power = power / torch.linalg.matrix_norm(power).clamp_min(tiny)
        power = power @ power
    # Its columns are multiples of the leading vector; the longest is no accident of rounding.
    vector = power @ power.sum(1)
    vector = vector / torch.linalg.vector_norm(vector).clamp_min(tiny)
    return torch.linalg.vector_norm(matrix @ vector)


def with_ridge(transposed: Tensor, ridge: float, norm: Tensor, usable: Tensor) -> Tensor:
    """``S^T + ridge * norm * I``, or I where S is nothing but rounding error."""
    eye = torch.eye(transposed.shape[0], dtype=transposed.dtype, device=transposed.device)
    return torch.where(usable, transposed + ridge * norm * eye, eye)
