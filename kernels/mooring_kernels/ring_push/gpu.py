"""Enqueue into the feature ring in Triton: normalise, cast and scatter in one pass over the incoming rows."""

# Triton's types know neither the launch options (num_warps) nor the element type of a pointer.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mooring_kernels.runtime.triton_launch import on_device_of, whole_row_tile

NORM_FLOOR = 1e-12  # of u(v) = v / max(norm2(v), 1e-12)


# B and head change from step to step: specialising on their values would compile again in mid-run.
@triton.jit(do_not_specialize=["B", "head"])
def ring_push_fwd_kernel(
    field_ptr: tl.tensor,
    bank_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    bank_labels_ptr: tl.tensor,
    B: int,
    head: int,
    norm_floor: float,
    K: tl.constexpr,
    D: tl.constexpr,
    stride_field_b: tl.constexpr,
    stride_field_d: tl.constexpr,
    stride_bank_k: tl.constexpr,
    stride_bank_d: tl.constexpr,
    stride_labels_b: tl.constexpr,
    stride_bank_labels_k: tl.constexpr,
    NORMALISE: tl.constexpr,
    WRITE_LABELS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_rows = rows < B
    slots = (head + rows) % K  # [BLOCK_B]; distinct because B <= K
    inside = in_rows[:, None] & (columns < D)[None, :]  # [BLOCK_B, BLOCK_D]
    field = tl.load(
        field_ptr + rows[:, None] * stride_field_b + columns[None, :] * stride_field_d, mask=inside, other=0.0
    ).to(tl.float32)  # [BLOCK_B, BLOCK_D]
    if NORMALISE:
        norm = tl.sqrt(tl.sum(field * field, axis=1))  # [BLOCK_B]
        field = field / tl.maximum(norm, norm_floor)[:, None]
    tl.store(
        bank_ptr + slots[:, None] * stride_bank_k + columns[None, :] * stride_bank_d,
        field.to(bank_ptr.dtype.element_ty),
        mask=inside,
    )
    if WRITE_LABELS:
        label = tl.load(labels_ptr + rows * stride_labels_b, mask=in_rows, other=-1)  # [BLOCK_B]
        tl.store(bank_labels_ptr + slots * stride_bank_labels_k, label, mask=in_rows)


def ring_push_fwd(
    bank_fields: list[Tensor],
    bank_labels: Tensor,
    fields: list[Tensor],
    labels: Tensor,
    head: int,
    normalise: bool,
) -> None:
    """Writes row i of every field and of ``labels`` to slot ``(head + i) mod K``, in place.

    Args:
        bank_fields: one [K, D_f] fp32 or bf16 tensor per field, written in place.
        bank_labels: [K] int64, written in place.
        fields: one [B, D_f] tensor per field, any float dtype, any strides, B <= K.
        labels: [B] int64.
        head: first slot to write, 0 <= head < K.
        normalise: store ``v / max(norm2(v), 1e-12)``, computed in fp32, instead of ``v``.
    """
    slots, rows = bank_labels.shape[0], labels.shape[0]
    assert rows <= slots and len(bank_fields) == len(fields) and len(fields) > 0
    if rows == 0:
        return
    with on_device_of(bank_labels):
        for number, (bank, field) in enumerate(zip(bank_fields, fields, strict=True)):
            width = bank.shape[1]
            tile = whole_row_tile(width)
            ring_push_fwd_kernel[(triton.cdiv(rows, tile.rows),)](
                field.detach(),
                bank,
                labels,
                bank_labels,
                rows,
                head,
                NORM_FLOOR,
                K=slots,
                D=width,
                stride_field_b=field.stride(0),
                stride_field_d=field.stride(1),
                stride_bank_k=bank.stride(0),
                stride_bank_d=bank.stride(1),
                stride_labels_b=labels.stride(0),
                stride_bank_labels_k=bank_labels.stride(0),
                NORMALISE=normalise,
                WRITE_LABELS=number == 0,
                BLOCK_B=tile.rows,
                BLOCK_D=tile.columns,
                num_warps=tile.warps,
            )
