"""Writing rows into a ring by the native module."""

from __future__ import annotations

from torch import Tensor

from mooring_kernels import _C
from mooring_kernels.runtime.native import dtype_code, threads


def ring_push_fwd(
    bank_fields: list[Tensor],
    bank_labels: Tensor,
    fields: list[Tensor],
    labels: Tensor,
    head: int,
    normalise: bool,
) -> None:
    """The bank's tensors are contiguous: they are written in place."""
    fields, labels = [field.contiguous() for field in fields], labels.contiguous()
    _C.ring_push(
        [
            (bank.data_ptr(), dtype_code(bank), field.data_ptr(), dtype_code(field), field.shape[1])
            for bank, field in zip(bank_fields, fields, strict=True)
        ],
        bank_labels.data_ptr(),
        labels.data_ptr(),
        bank_labels.shape[0],
        labels.shape[0],
        head,
        normalise,
        threads(),
    )
