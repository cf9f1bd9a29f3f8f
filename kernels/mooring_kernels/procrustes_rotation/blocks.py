"""Inverses and Gram matrices by blocks, at the rate of the matrix product. For the CPU.

Measured at D = 2048 on one thread, in units of D^3 FLOP at the rate of a plain matrix product: inverse of a general
matrix 2.7 (torch.linalg.inv 5.1), of a positive definite one 1.3 (Cholesky and cholesky_inverse 2.0), Gram 1.2 (2).
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 96  # columns eliminated at once: 64 to 128 cost the same at D = 2048, 256 costs 15 % more
LEAF = 256  # below it LAPACK's own inverse is as fast


def gram(x: Tensor) -> Tensor:
    """``x^T x`` [D, D] for x [N, D]: only the blocks on and above the diagonal are computed, 9/16 of the FLOP."""
    width = x.shape[1]
    if width < 512:
        return x.T @ x
    result = x.new_empty(width, width)
    step = -(-width // 8)
    for start in range(0, width, step):
        stop = min(start + step, width)
        torch.mm(x[:, start:stop].T, x[:, start:], out=result[start:stop, start:])
        result[stop:, start:stop] = result[start:stop, stop:].T
    return result


def inverse_transpose(x: Tensor) -> Tensor:
    """``X^-T`` of a square matrix by blocked Gauss-Jordan elimination with partial pivoting, 2 D^3 FLOP.

    A pivot of zero is replaced by the rounding error of the largest entry: a change of X that X does not show.
    """
    width = x.shape[0]
    a = x.clone(memory_format=torch.contiguous_format)
    least = torch.finfo(a.dtype).eps * a.abs().amax()
    order = torch.arange(width)
    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        factors, pivots, _ = torch.linalg.lu_factor_ex(a[start:, start:stop])
        moved, source = _row_moves(pivots, start)
        a[moved] = a[source]
        order[moved] = order[source]
        pivot_block, below = factors[: stop - start], factors[stop - start :]
        diagonal = pivot_block.diagonal()
        diagonal.copy_(torch.where(diagonal.abs() < least, least.copysign(diagonal), diagonal))
        # L^-1 and U^-1 apart, and L below as it is: (L U)^-1 in one piece loses the square of the condition. As
        # products: solving for that many columns runs at half their rate.
        eye = torch.eye(stop - start, dtype=a.dtype)
        lower = torch.linalg.solve_triangular(pivot_block, eye, upper=False, unitriangular=True)
        upper = torch.linalg.solve_triangular(pivot_block, eye, upper=True)
        column = torch.zeros_like(a[:, start:stop])
        column[:start] = a[:start, start:stop] @ upper
        column[stop:] = below
        # The column block becomes that of the identity: elimination leaves the inverse's there.
        a[:, start:stop] = 0
        a[start:stop, start:stop].fill_diagonal_(1)
        row = lower @ a[start:stop]
        a[start:stop] = 0
        a.addmm_(column, row, alpha=-1)
        a[start:stop] = upper @ row
    # (P X)^-1 = X^-1 P^T: undo the row order on the columns of the inverse, which are rows of its transpose.
    result = torch.empty_like(a)
    result[order] = a.T.contiguous()
    return result


def _row_moves(pivots: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """LAPACK's sequence of swaps as (rows that change, where their new content lies), counted from ``start``."""
    content: dict[int, int] = {}
    swaps: list[int] = pivots.tolist()
    for i, pivot in enumerate(swaps):
        j = pivot - 1
        if i != j:
            content[i], content[j] = content.get(j, j), content.get(i, i)
    moved = torch.tensor(list(content), dtype=torch.int64) + start
    return moved, torch.tensor(list(content.values()), dtype=torch.int64) + start


def definite_inverse_(a: Tensor) -> Tensor:
    """Inverse of a symmetric positive definite matrix in its own memory, by Schur complements. D^3 FLOP or so.

    With ``W = A11^-1 A12`` and ``C = (A22 - A12^T W)^-1``: ``[A11^-1 + W C W^T, -W C; ., C]``.
    """
    width = a.shape[0]
    if width <= LEAF:
        factor, _ = torch.linalg.cholesky_ex(a)
        return a.copy_(torch.cholesky_inverse(factor))
    half = width // 2
    top, side, bottom = a[:half, :half], a[:half, half:], a[half:, half:]
    definite_inverse_(top)
    w = top @ side
    _subtract_symmetric_(bottom, side.T, w)
    definite_inverse_(bottom)
    torch.mm(w, bottom, out=side)
    side.neg_()
    _subtract_symmetric_(top, w, side.T)
    a[half:, :half] = side.T
    return a


def _subtract_symmetric_(target: Tensor, left: Tensor, right: Tensor) -> None:
    """``target -= left @ right`` where the product is symmetric: its blocks below the diagonal are mirrored."""
    width = target.shape[0]
    step = -(-width // 4) if width >= 512 else width
    for start in range(0, width, step):
        stop = min(start + step, width)
        block = target[start:stop, start:]
        torch.addmm(block, left[start:stop], right[:, start:], alpha=-1, out=block)
        target[stop:, start:stop] = target[start:stop, stop:].T
