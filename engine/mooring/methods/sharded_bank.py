"""DR-Tune's bank statistics where each rank holds a part of the rows: small sums over ranks in place of the rows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mooring.collectives import all_reduce_
from mooring.distributed import Ranks
from mooring_kernels import procrustes_rotation, row_normalise
from mooring_kernels.calibrate.reference import calibrate as moved_rows

_PURPOSE = "bank statistics"


@torch.no_grad()
def sharded_class_statistics(
    frozen: Tensor,
    tuned: Tensor,
    labels: Tensor,
    head_weight: Tensor,
    cga_scale: float,
    ranks: Ranks,
    *,
    unit_prototypes: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``mooring_kernels.class_statistics`` of the rows of all ranks; exchanges (2 D + 3) C floats.

    Args:
        frozen, tuned: [K / world, D], this rank's rows.
        labels: [K / world] int64; -1 masks a row.
        head_weight: [C, D].
        cga_scale: sharpness of the confidence weights.
        ranks: who holds the rows.
        unit_prototypes: False: confidence is ``cga_scale W_c . d_k`` with the head's rows as they are.

    Returns:
        frozen_mean [C, D], tuned_mean [C, D], count [C], fp32, the same on every rank.
    """
    classes, width = head_weight.shape
    valid = labels >= 0
    index = torch.where(valid, labels, 0)
    frozen, tuned = (torch.where(valid[:, None], rows.float(), 0) for rows in (frozen, tuned))
    prototype = row_normalise(head_weight.float())[0] if unit_prototypes else head_weight.float()
    confidence = torch.where(valid, cga_scale * (tuned * prototype[index]).sum(1), -torch.inf)
    # |confidence| <= cga_scale with unit rows, but rows may be kept as they come
    highest = head_weight.new_full((classes,), -torch.inf, dtype=torch.float32)
    highest.scatter_reduce_(0, index, confidence, "amax")
    ranks.all_reduce_(highest, "max", _PURPOSE)
    weight = torch.where(valid, torch.exp(confidence - highest[index]), 0)
    sums = head_weight.new_zeros(classes, 2 * width + 2, dtype=torch.float32)
    columns = [frozen, weight[:, None] * tuned, weight[:, None], valid[:, None].float()]
    sums.index_add_(0, index, torch.cat(columns, 1))
    all_reduce_(sums, ranks, _PURPOSE)
    frozen_sum, tuned_sum, total, count = sums.split([width, width, 1, 1], 1)
    tuned_mean = tuned_sum / torch.where(total > 0, total, 1)
    return frozen_sum / count.clamp_min(1), tuned_mean, count.squeeze(1)


@torch.no_grad()
def sharded_calibration(
    frozen: Tensor,
    tuned: Tensor,
    labels: Tensor,
    head_weight: Tensor,
    rotation: Tensor | None,
    scale: Tensor,
    ranks: Ranks,
    *,
    cga_scale: float,
    translation: bool,
) -> Tensor:
    """``mooring_kernels.calibrate`` of this rank's rows by the means over the rows of all, [K / world, D] fp32."""
    if not translation:  # as the op: one pair of plain means for all classes
        labels = torch.where(labels >= 0, 0, -1)
        head_weight = torch.zeros_like(head_weight[:1])
    if translation or rotation is not None:
        frozen_mean, tuned_mean, _ = sharded_class_statistics(
            frozen, tuned, labels, head_weight, cga_scale, ranks
        )
    else:
        frozen_mean = tuned_mean = torch.zeros_like(head_weight)
    return moved_rows(frozen, labels, frozen_mean, tuned_mean, rotation, scale)


@torch.no_grad()
def sharded_paper_calibration(
    frozen: Tensor,
    tuned: Tensor,
    labels: Tensor,
    head_weight: Tensor,
    rotation: Tensor | None,
    ranks: Ranks,
    *,
    translation: bool,
) -> Tensor:
    """``paper_calibration`` of this rank's rows by the means over the rows of all, [K / world, D] fp32."""
    valid, index = (labels >= 0)[:, None], labels.clamp_min(0)
    moved = torch.where(valid, frozen.float(), 0)
    moved = moved if rotation is None else moved @ rotation.T
    if not translation:
        return moved
    frozen_mean, tuned_mean, _ = sharded_class_statistics(
        frozen, tuned, labels, head_weight, 1.0, ranks, unit_prototypes=False
    )
    frozen_mean = frozen_mean if rotation is None else frozen_mean @ rotation.T
    return (moved + tuned_mean[index] - frozen_mean[index]) * valid


@torch.no_grad()
def sharded_rotation(
    frozen: Tensor,
    tuned: Tensor,
    labels: Tensor,
    ranks: Ranks,
    *,
    ridge: float,
    solver: Literal["auto", "newton", "polar", "svd"],
    centred: bool,
    det_fix: bool,
) -> Tensor:
    """``mooring_kernels.procrustes_rotation`` of the rows of all ranks; exchanges D^2 + 2 D + 3 floats."""
    valid = (labels >= 0)[:, None]
    x, y = (torch.where(valid, rows.float(), 0) for rows in (frozen, tuned))
    ends = torch.stack([valid.sum().float(), x.square().sum(), y.square().sum()])
    parts = [x.T @ y, x.sum(0), y.sum(0), ends]
    flat = all_reduce_(torch.cat([part.flatten() for part in parts]), ranks, _PURPOSE)
    cross, x_sum, y_sum, (count, x_square, y_square) = (
        part.view_as(like) for part, like in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
    )
    if centred:
        cross = cross - torch.outer(x_sum, y_sum) / count.clamp_min(1)
    # where the rows are equal, what is left of S is rounding: the op gives the identity for a covariance of zero
    noise = 16 * torch.finfo(torch.float32).eps * (x_square * y_square).sqrt()
    cross = torch.where(torch.linalg.matrix_norm(cross) > noise, cross, 0)
    # S as the covariance of D rows: X = I, Y = S
    rows = torch.eye(len(cross), device=cross.device)
    labelled = torch.zeros(len(cross), dtype=torch.int64, device=cross.device)
    return procrustes_rotation(
        rows, cross, labelled, ridge=ridge, solver=solver, centred=False, det_fix=det_fix
    )
