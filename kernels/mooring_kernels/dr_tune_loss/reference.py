"""DR-Tune's loss over a batch and its calibrated bank, the definition: the three ops of the block in a row."""

from __future__ import annotations

from torch import Tensor

from mooring_kernels.bank_cross_entropy import reference as bank_cross_entropy
from mooring_kernels.calibrate import reference as calibrate
from mooring_kernels.class_statistics import reference as class_statistics


def dr_tune_loss(
    features: Tensor,
    labels: Tensor,
    frozen: Tensor,
    tuned: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rotation: Tensor | None,
    scale: Tensor,
    cga_scale: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Sum over the valid rows of both, and the batch logits [B, C]."""
    frozen_mean, tuned_mean, _ = class_statistics.class_statistics(
        frozen, tuned, bank_labels, weight.detach(), cga_scale
    )
    calibrated = calibrate.calibrate(frozen, bank_labels, frozen_mean, tuned_mean, rotation, scale)
    return bank_cross_entropy.bank_cross_entropy(
        features, labels, calibrated, bank_labels, weight, bias, label_smoothing
    )
