"""TeS's loss as its public code computes it, re-stated (github idstcv/TeS, commit 43bf264).

What decides its cost is kept: the cosines are divided by the temperature twice, softmax and log-softmax of the
result are computed apart, the soft target is written out from a one-hot matrix, and the text loss is a
cross-entropy of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def loss(
    logits: Tensor, cosines: Tensor, labels: Tensor, tau: float, lambda_v: float, lambda_t: float
) -> Tensor:
    """Cross-entropy against the mixed target plus the weighted text loss; every label must be a class.

    Args:
        logits: [B, C]. cosines: [B, C]. labels: [B]. tau, lambda_v, lambda_t: as in the op.

    Returns:
        0-d loss.
    """
    with torch.no_grad():
        reference = torch.softmax(cosines / tau, dim=1)
        onehot = torch.zeros_like(reference).scatter_(1, labels[:, None], 1.0)
        target = (1.0 - lambda_v) * onehot + lambda_v * reference
    vision_loss = torch.mean(torch.sum(-target * F.log_softmax(logits, dim=1), dim=1))
    return vision_loss + lambda_t * F.cross_entropy(cosines / tau, labels)
