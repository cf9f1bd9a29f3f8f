"""Writing rows into one ring per class by the native module."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels import _C
from mooring_kernels.runtime.native import dtype_code, threads


def class_ring_push_fwd(
    bank_fields: list[Tensor],
    bank_labels: Tensor,
    heads: Tensor,
    fields: list[Tensor],
    labels: Tensor,
    normalise: bool,
) -> Tensor:
    """The bank's tensors are contiguous: they are written in place."""
    fields, labels = [field.contiguous() for field in fields], labels.contiguous()
    slots = torch.empty_like(labels)
    classes, capacity = bank_labels.shape
    _C.class_ring_push(
        [
            (
                *(bank.data_ptr(), dtype_code(bank), field.data_ptr(), dtype_code(field)),
                *(bank[0, 0].numel() // bank.shape[-1], bank.shape[-1]),
            )
            for bank, field in zip(bank_fields, fields, strict=True)
        ],
        (bank_labels.data_ptr(), heads.data_ptr(), labels.data_ptr(), slots.data_ptr()),
        (classes, capacity, labels.shape[0]),
        normalise,
        threads(),
    )
    return slots
