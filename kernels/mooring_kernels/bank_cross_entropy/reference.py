"""Cross-entropy over a batch and a bank, the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mooring_kernels.runtime.dispatch import working_dtype

_IGNORED = -100


def summed_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Sum over the rows whose label is a class; the gradient of the others is 0, whatever they hold."""
    valid = (labels >= 0) & (labels < logits.shape[1])
    target = torch.where(valid, labels, _IGNORED)
    # selected before the arithmetic: afterwards 0 times NaN would reach the gradient
    logits = torch.where(valid[:, None], logits, 0)
    return F.cross_entropy(
        logits, target, ignore_index=_IGNORED, reduction="sum", label_smoothing=label_smoothing
    )


def bank_cross_entropy(
    features: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Sum over the valid rows of both, and the batch logits [B, C]."""
    dtype = working_dtype(features, bank, weight)
    with torch.autocast(features.device.type, enabled=False):
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        logits = F.linear(features.to(dtype), weight, bias)
        bank_logits = F.linear(bank.to(dtype), weight, bias)
        total = summed_cross_entropy(logits, labels, label_smoothing)
        return total + summed_cross_entropy(bank_logits, bank_labels, label_smoothing), logits
