"""Writing rows into a ring, the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels.row_normalise.reference import row_normalise

NORM_FLOOR = 1e-12


def ring_push(
    bank_fields: list[Tensor],
    bank_labels: Tensor,
    fields: list[Tensor],
    labels: Tensor,
    head: int,
    normalise: bool,
) -> None:
    """Row i goes to slot (head + i) mod K. B <= K, so that no slot is written twice."""
    slots = (head + torch.arange(labels.shape[0], device=labels.device)) % bank_labels.shape[0]
    for bank, field in zip(bank_fields, fields, strict=True):
        # Widened first: a bfloat16 row is normalised in fp32 and rounded once, when it is stored.
        wide = field.to(torch.promote_types(field.dtype, torch.float32))
        rows = row_normalise(wide, NORM_FLOOR)[0] if normalise else wide
        bank[slots] = rows.to(bank.dtype)
    bank_labels[slots] = labels
