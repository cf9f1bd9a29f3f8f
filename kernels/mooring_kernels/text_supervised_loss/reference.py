"""Text-supervised loss, the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mooring_kernels.runtime.dispatch import working_dtype


def text_supervised_loss(
    logits: Tensor,
    cosines: Tensor,
    labels: Tensor,
    tau: float,
    lambda_v: float,
    lambda_t: float,
    target: Tensor | None = None,
) -> Tensor:
    """Mean over the valid rows of the cross-entropy against the mixed target, plus that of the text logits."""
    dtype = working_dtype(logits, cosines)
    with torch.autocast(logits.device.type, enabled=False):
        valid = (labels >= 0) & (labels < logits.shape[1])
        # masked rows are selected away before the arithmetic: afterwards 0 times NaN would reach the gradient
        log_softmax = F.log_softmax(torch.where(valid[:, None], logits.to(dtype), 0), 1)
        log_reference = F.log_softmax(torch.where(valid[:, None], cosines.to(dtype), 0) / tau, 1)
        if target is None:
            label = torch.where(valid, labels, 0)[:, None]
            own, own_text = log_softmax.gather(1, label)[:, 0], log_reference.gather(1, label)[:, 0]
        else:
            given = torch.where(valid[:, None], target.detach().to(dtype), 0)
            own, own_text = (given * log_softmax).sum(1), (given * log_reference).sum(1)
        rows = -(1 - lambda_v) * own
        # a weight of 0 asks for nothing of that term, also where it is infinite
        if lambda_v != 0:
            rows = rows - lambda_v * (log_reference.detach().exp() * log_softmax).sum(1)
        rows = rows - lambda_t * own_text  # also with 0: the projection head stays in the graph
        return torch.where(valid, rows, 0).sum() / valid.sum().clamp_min(1)
