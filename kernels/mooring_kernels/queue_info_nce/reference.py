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
        query, queue = query.to(dtype), queue.to(dtype)
        filled = queue_labels >= 0
        logits = (query @ queue.T / temperature).masked_fill(~filled, -torch.inf)
        positive = (labels[:, None] == queue_labels) & filled  # [B, N]
        if own_key is not None:
            own = (query * own_key.to(dtype)).sum(1, keepdim=True) / temperature
            logits = torch.cat([own, logits], 1)
            positive = torch.cat([torch.ones_like(own, dtype=torch.bool), positive], 1)
        positives = positive.sum(1)
        valid = (labels >= 0) & (positives > 0)
        logits = torch.where(valid[:, None], logits, 0)
        share = 1 / positives.clamp_min(1).to(dtype)
        mean_positive = torch.where(positive, logits, 0).sum(1) * share
        losses = torch.logsumexp(logits, 1) - mean_positive + share.log()
        return torch.where(valid, losses, 0).sum() / valid.sum().clamp_min(1)
