"""Cross-entropy of two heads by the native module."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels import _C
from mooring_kernels.runtime.native import dtype_code, threads


def _head(logits: Tensor, labels: Tensor) -> tuple[int, int, int, int, int]:
    rows, classes = logits.shape
    return logits.data_ptr(), dtype_code(logits), labels.data_ptr(), rows, classes


def two_head_cross_entropy_fwd(
    target_logits: Tensor,
    target_labels: Tensor,
    source_logits: Tensor,
    source_labels: Tensor,
    weight: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, target loss and source loss, 0-d; 1 / (number of valid rows) [2] and log-sum-exps [B + S]."""
    target_logits, target_labels = target_logits.contiguous(), target_labels.contiguous()
    source_logits, source_labels = source_logits.contiguous(), source_labels.contiguous()
    # three tensors: outputs of an operator must not share memory
    loss, target_loss, source_loss = (torch.empty((), dtype=torch.float32) for _ in range(3))
    inverse_counts = torch.empty(2, dtype=torch.float32)
    lse = torch.empty(len(target_labels) + len(source_labels), dtype=torch.float32)
    _C.two_head_cross_entropy_forward(
        _head(target_logits, target_labels),
        _head(source_logits, source_labels),
        weight,
        label_smoothing,
        (loss.data_ptr(), target_loss.data_ptr(), source_loss.data_ptr()),
        inverse_counts.data_ptr(),
        lse.data_ptr(),
        threads(),
    )
    return loss, target_loss, source_loss, inverse_counts, lse


def two_head_cross_entropy_bwd(
    target_logits: Tensor,
    target_labels: Tensor,
    source_logits: Tensor,
    source_labels: Tensor,
    lse: Tensor,
    target_scale: float,
    source_scale: float,
    label_smoothing: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of both logits in their dtypes; an empty tensor for each that ``needs`` leaves out."""
    target_logits, target_labels = target_logits.contiguous(), target_labels.contiguous()
    source_logits, source_labels = source_logits.contiguous(), source_labels.contiguous()
    grads = [
        torch.empty(x.shape if needed else (0,), dtype=x.dtype)
        for x, needed in zip((target_logits, source_logits), needs, strict=True)
    ]
    _C.two_head_cross_entropy_backward(
        _head(target_logits, target_labels),
        _head(source_logits, source_labels),
        lse.data_ptr(),
        target_scale,
        source_scale,
        label_smoothing,
        grads[0].data_ptr(),
        grads[1].data_ptr(),
        threads(),
    )
    return grads[0], grads[1]
