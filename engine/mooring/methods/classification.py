"""Cross-entropy and running accuracy on the rows of a batch, shared by all methods."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy in fp32 over the rows whose label is not -1; 0 with zero gradient if there are none.

    Args:
        logits: [B, C], any float dtype.
        labels: [B] int64, or soft targets [B, C] whose padding rows are all zero.
        label_smoothing: share of the target spread evenly over the classes.
    """
    logits = logits.float()
    if labels.ndim == 2:
        valid = labels.sum(1) > 0
        targets = labels * (1 - label_smoothing) + valid[:, None] * (label_smoothing / labels.shape[1])
        # where, not a product: a padding row's logits may be infinite
        rows = torch.where(valid[:, None], logits, 0.0)
        return -(targets * rows.log_softmax(1)).sum() / valid.sum().clamp_min(1)
    total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing)
    return total / (labels >= 0).sum().clamp_min(1)


def mean_over_valid(rows: Tensor, valid: Tensor) -> Tensor:
    """Mean of a number per row over the rows that count; 0 if there are none.

    Args:
        rows: [B] float.
        valid: [B] bool.
    """
    return (rows * valid).sum() / valid.sum().clamp_min(1)


def tempered_divergence(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor) -> Tensor:
    """``mean_i KL(softmax(t_i / T) || softmax(s_i / T))`` over the valid rows, without a factor T^2.

    Args:
        student: s, logits [B, C] fp32.
        teacher: t, logits [B, C] fp32.
        temperature: T > 0.
        valid: [B] bool.
    """
    now, wanted = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
    return mean_over_valid(F.kl_div(now, wanted, reduction="none", log_target=True).sum(1), valid)


def batch_metrics(loss: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Detached device scalars: the loss, and the count of valid and of correct rows (so that sums can be averaged)."""
    if labels.ndim == 2:
        valid, hard = labels.sum(1) > 0, labels.argmax(1)
    else:
        valid, hard = labels >= 0, labels
    correct = (logits.detach().argmax(1) == hard) & valid
    return {
        "loss": loss.detach().float(),
        "rows": valid.sum().to(torch.float32),
        "correct": correct.sum().to(torch.float32),
    }
