"""InfoNCE with several positives against a queue, the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels.runtime.dispatch import working_dtype


def queue_info_nce(
    query: Tensor,
    own_key: Tensor | None,
    labels: Tensor,
    queue: Tensor,
    queue_labels: Tensor,
    temperature: float,
) -> Tensor:
    """Mean over the queries that have a label and a positive; 0 where there are none."""
    dtype = working_dtype(query, queue, *(() if own_key is None else (own_key,)))
    with torch.autocast(query.device.type, enabled=False):
        filled = queue_labels >= 0
        positive = (labels[:, None] == queue_labels) & filled  # [B, N]
        if own_key is not None:
            positive = torch.cat([filled.new_ones(len(query), 1), positive], 1)
        positives = positive.sum(1)
        valid = (labels >= 0) & (positives > 0)
        # what is masked is selected away before the arithmetic: afterwards 0 times NaN would reach the gradient
        query = torch.where(valid[:, None], query.to(dtype), 0)
        queue = torch.where(filled[:, None], queue.to(dtype), 0)
        logits = (query @ queue.T / temperature).masked_fill(~filled, -torch.inf)
        if own_key is not None:
            own = (query * torch.where(valid[:, None], own_key.to(dtype), 0)).sum(1, keepdim=True)
            logits = torch.cat([own / temperature, logits], 1)
        logits = torch.where(valid[:, None], logits, 0)
        share = 1 / positives.clamp_min(1).to(dtype)
        mean_positive = torch.where(positive, logits, 0).sum(1) * share
        losses = torch.logsumexp(logits, 1) - mean_positive + share.log()
        return torch.where(valid, losses, 0).sum() / valid.sum().clamp_min(1)
