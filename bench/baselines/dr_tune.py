"""DR-Tune's bank block as its public code computes it, re-stated (github weeknan/DR-Tune, commit ef9a7b1).

The structure that decides its cost is kept: the banks are normalised again on every step, a Python loop
visits every class and looks up its rows (a device sync each), the rotation is a full SVD with a determinant
fix on every tenth batch, the loss concatenates batch and bank. Two faults are not kept, so that the results
can be held against the definition: a class with one row no longer averages over coordinates, and an absent
class is not visited.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def enqueue(
    bank_fields: list[Tensor], bank_labels: Tensor, fields: list[Tensor], labels: Tensor, head: int
) -> int:
    """Slice write of unit rows at ``head``; the batch must divide the bank (the public code stops otherwise).

    Args:
        bank_fields: [K, D] each. fields: [B, D] each. bank_labels: [K]. labels: [B]. head: next slot.

    Returns:
        The next head.
    """
    rows, slots = labels.shape[0], bank_labels.shape[0]
    assert slots % rows == 0
    for bank, field in zip(bank_fields, fields, strict=True):
        bank[head : head + rows] = F.normalize(field, dim=1).to(bank.dtype)
    bank_labels[head : head + rows] = labels
    return (head + rows) % slots


def rotation(frozen: Tensor, tuned: Tensor) -> Tensor:
    """Orthogonal map of determinant 1 that takes the centred frozen bank onto the centred tuned bank.

    Args:
        frozen: [K, D]. tuned: [K, D].

    Returns:
        [D, D] fp32, acting on column vectors. Not unique where singular values of the covariance are equal.
    """
    frozen, tuned = F.normalize(frozen.float(), dim=1), F.normalize(tuned.float(), dim=1)
    frozen, tuned = frozen - frozen.mean(0), tuned - tuned.mean(0)
    left, _, right = torch.linalg.svd(frozen.T @ tuned)
    fix = torch.ones(left.shape[0], device=left.device)
    fix[-1] = torch.det(right.T @ left.T)
    return (right.T * fix) @ left.T


def calibrate(
    frozen: Tensor, tuned: Tensor, labels: Tensor, head_weight: Tensor, turn: Tensor | None, scale: Tensor
) -> Tensor:
    """Calibrated frozen rows, class by class.

    Args:
        frozen, tuned: [K, D]. labels: [K]. head_weight: [C, D]. turn: [D, D] or None. scale: 0-d.

    Returns:
        [K, D] fp32.
    """
    frozen, tuned = F.normalize(frozen.float(), dim=1), F.normalize(tuned.float(), dim=1)
    prototypes = F.normalize(head_weight.float(), dim=1)
    centred = frozen - frozen.mean(0)
    turned = centred if turn is None else centred @ turn.T
    calibrated = torch.zeros_like(turned)
    for c in range(head_weight.shape[0]):
        members = (labels == c).nonzero().squeeze(1)
        if members.numel() == 0:
            continue
        weight = torch.exp(tuned[members] @ prototypes[c])
        weight = weight / weight.sum()
        tuned_mean = (weight[:, None] * tuned[members]).sum(0)
        frozen_mean = turned[members].mean(0)
        calibrated[members] = turned[members] + (tuned_mean - frozen_mean)
    return scale * F.normalize(calibrated, dim=1)


def loss(
    features: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Mean cross-entropy over the concatenated batch and bank rows; every slot of the bank must be filled.

    Args:
        features: [B, D]. labels: [B]. bank: [K, D]. bank_labels: [K]. weight: [C, D]. bias: [C] or None.

    Returns:
        0-d loss.
    """
    logits = F.linear(torch.cat([features, bank]), weight, bias)
    return F.cross_entropy(logits, torch.cat([labels, bank_labels]))
