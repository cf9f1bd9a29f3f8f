"""Writing rows into one ring per class, the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels.ring_push.reference import NORM_FLOOR


def class_ring_push(
    bank_fields: list[Tensor],
    bank_labels: Tensor,
    heads: Tensor,
    fields: list[Tensor],
    labels: Tensor,
    normalise: bool,
) -> Tensor:
    """The flat slot of each row, -1 where it is skipped: its class is none, or K later rows have the same one."""
    classes, capacity = bank_labels.shape
    valid = (labels >= 0) & (labels < classes)
    own = torch.where(valid, labels, 0)
    same = (labels[:, None] == labels).long()
    earlier, later = same.tril(-1).sum(1), same.triu(1).sum(1)
    kept = valid & (later < capacity)
    slots = torch.where(kept, own * capacity + (heads[own] + earlier) % capacity, -1)
    heads.copy_((heads + torch.zeros_like(heads).index_add_(0, own, valid.long())) % capacity)
    for bank, field in zip(bank_fields, fields, strict=True):
        # widened first: a bfloat16 row is normalised in fp32 and rounded once, when it is stored
        rows = field.to(torch.promote_types(field.dtype, torch.float32))
        if normalise:
            rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
        bank.flatten(0, 1)[slots[kept]] = rows[kept].to(bank.dtype)
    bank_labels.view(-1)[slots[kept]] = labels[kept]
    return slots
