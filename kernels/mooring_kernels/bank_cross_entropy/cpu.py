"""Softmax cross-entropy over rows by the native module."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels import _C
from mooring_kernels.runtime.native import threads


def softmax_cross_entropy_rows_(
    logits: Tensor, labels: Tensor, label_smoothing: float, gradient: bool
) -> Tensor:
    """Losses of fp32 logits [N, C], whose rows may lie apart; with ``gradient`` they become it, in place."""
    rows, classes = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    labels = labels.contiguous()
    loss_rows = torch.empty(rows, dtype=torch.float32)
    _C.softmax_cross_entropy_in_place(
        logits.data_ptr(),
        max(logits.stride(0), classes),
        labels.data_ptr(),
        label_smoothing,
        gradient,
        loss_rows.data_ptr(),
        rows,
        classes,
        threads(),
    )
    return loss_rows
