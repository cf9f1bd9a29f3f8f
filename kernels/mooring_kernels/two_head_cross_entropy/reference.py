"""Cross-entropy of two heads, the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels.bank_cross_entropy.reference import summed_cross_entropy
from mooring_kernels.runtime.dispatch import working_dtype


def two_head_cross_entropy(
    target_logits: Tensor,
    target_labels: Tensor,
    source_logits: Tensor,
    source_labels: Tensor,
    source_weight: Tensor | float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Target loss plus weighted source loss, and both: means over the valid rows of each head."""
    dtype = working_dtype(target_logits, source_logits)

    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        count = ((labels >= 0) & (labels < logits.shape[1])).sum()
        return summed_cross_entropy(logits.to(dtype), labels, label_smoothing) / count.clamp_min(1)

    with torch.autocast(target_logits.device.type, enabled=False):
        target_loss, source_loss = mean(target_logits, target_labels), mean(source_logits, source_labels)
        return target_loss + source_weight * source_loss, target_loss, source_loss
