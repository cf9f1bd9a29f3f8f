"""Enqueue into class rings in Triton: one launch finds the slots, one per field normalises, casts and scatters."""

# Triton's types know neither the launch options (num_warps) nor the element type of a pointer.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mooring_kernels.ring_push.gpu import NORM_FLOOR
from mooring_kernels.runtime.triton_launch import on_device_of, whole_row_tile

_RANKED = 16  # rows of a program that ranks
_COMPARED = 64  # labels it compares them with at once


@triton.jit(do_not_specialize=["B"])
def class_ring_slots_kernel(
    labels_ptr: tl.tensor,
    heads_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    next_heads_ptr: tl.tensor,
    B: int,
    C: tl.constexpr,
    K: tl.constexpr,
    stride_labels_b: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    in_rows = rows < B
    label = tl.load(labels_ptr + rows * stride_labels_b, mask=in_rows, other=-1)  # [BLOCK_B]
    valid = (label >= 0) & (label < C)
    earlier = tl.zeros([BLOCK_B], dtype=tl.int32)  # rows of the same class
    later = tl.zeros([BLOCK_B], dtype=tl.int32)
    for first in range(0, B, BLOCK_J):
        others = first + tl.arange(0, BLOCK_J)  # [BLOCK_J]
        other = tl.load(labels_ptr + others.to(tl.int64) * stride_labels_b, mask=others < B, other=-1)
        same = other[None, :] == label[:, None]  # [BLOCK_B, BLOCK_J]
        earlier += tl.sum((same & (others[None, :] < rows[:, None])).to(tl.int32), axis=1)
        later += tl.sum((same & (others[None, :] > rows[:, None])).to(tl.int32), axis=1)
    head = tl.load(heads_ptr + label, mask=valid, other=0) % K  # [BLOCK_B]
    slot = label * K + (head + earlier) % K
    tl.store(slots_ptr + rows, tl.where(valid & (later < K), slot, -1), mask=in_rows)
    # the last row of a class knows where the next one goes
    tl.store(
        next_heads_ptr + rows, tl.where(valid & (later == 0), (head + earlier + 1) % K, -1), mask=in_rows
    )


@triton.jit(do_not_specialize=["rows_in_all"])
def class_ring_push_fwd_kernel(
    field_ptr: tl.tensor,
    bank_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    bank_labels_ptr: tl.tensor,
    heads_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    next_heads_ptr: tl.tensor,
    rows_in_all: int,
    norm_floor: float,
    P: tl.constexpr,
    D: tl.constexpr,
    stride_field_b: tl.constexpr,
    stride_field_p: tl.constexpr,
    stride_field_d: tl.constexpr,
    stride_labels_b: tl.constexpr,
    NORMALISE: tl.constexpr,
    WRITE_LABELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R] of [B P]
    image, patch = rows // P, rows % P
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_rows = rows < rows_in_all
    slot = tl.load(slots_ptr + image, mask=in_rows, other=-1)  # [BLOCK_R]; distinct where not -1
    kept = slot >= 0
    inside = kept[:, None] & (columns < D)[None, :]  # [BLOCK_R, BLOCK_D]
    field = tl.load(
        field_ptr
        + (image * stride_field_b + patch * stride_field_p)[:, None]
        + columns[None, :] * stride_field_d,
        mask=inside,
        other=0.0,
    ).to(tl.float32)  # [BLOCK_R, BLOCK_D]
    if NORMALISE:
        norm = tl.sqrt(tl.sum(field * field, axis=1))  # [BLOCK_R]
        field = field / tl.maximum(norm, norm_floor)[:, None]
    tl.store(
        bank_ptr + (slot * P + patch)[:, None] * D + columns[None, :],
        field.to(bank_ptr.dtype.element_ty),
        mask=inside,
    )
    if WRITE_LABELS:
        once = in_rows & (patch == 0)
        label = tl.load(labels_ptr + image * stride_labels_b, mask=once, other=-1)  # [BLOCK_R]
        tl.store(bank_labels_ptr + slot, label, mask=once & kept)
        next_head = tl.load(next_heads_ptr + image, mask=once, other=-1)
        tl.store(heads_ptr + label, next_head, mask=once & (next_head >= 0))


def class_ring_push_fwd(
    bank_fields: list[Tensor],
    bank_labels: Tensor,
    heads: Tensor,
    fields: list[Tensor],
    labels: Tensor,
    normalise: bool,
) -> Tensor:
    """Writes every row to its slot and moves the heads on, in place.

    Args:
        bank_fields: one contiguous [C, K, ..., D_f] fp32 or bf16 tensor per field, written in place.
        bank_labels: [C, K] int64, contiguous, written in place.
        heads: [C] int64, contiguous, written in place.
        fields: one [B, ..., D_f] tensor per field, any float dtype, any strides.
        labels: [B] int64; a row whose label is no class is not read.
        normalise: store ``v / max(norm2(v), 1e-12)``, computed in fp32, instead of ``v``.

    Returns:
        [B] int64 flat slots, -1 where a row was skipped.
    """
    (classes, capacity), batch = bank_labels.shape, labels.shape[0]
    slots = torch.empty((batch,), dtype=torch.int64, device=labels.device)
    next_heads = torch.empty((batch,), dtype=torch.int64, device=labels.device)
    if batch == 0:
        return slots
    with on_device_of(bank_labels):
        class_ring_slots_kernel[(triton.cdiv(batch, _RANKED),)](
            labels,
            heads,
            slots,
            next_heads,
            batch,
            C=classes,
            K=capacity,
            stride_labels_b=labels.stride(0),
            BLOCK_B=_RANKED,
            BLOCK_J=_COMPARED,
            num_warps=4,
        )
        for number, (bank, field) in enumerate(zip(bank_fields, fields, strict=True)):
            width = bank.shape[-1]
            vectors = field.detach().reshape(batch, -1, width)  # [B, P, D]
            patches = vectors.shape[1]
            tile = whole_row_tile(width)
            class_ring_push_fwd_kernel[(triton.cdiv(batch * patches, tile.rows),)](
                vectors,
                bank,
                labels,
                bank_labels,
                heads,
                slots,
                next_heads,
                batch * patches,
                NORM_FLOOR,
                P=patches,
                D=width,
                stride_field_b=vectors.stride(0),
                stride_field_p=vectors.stride(1),
                stride_field_d=vectors.stride(2),
                stride_labels_b=labels.stride(0),
                NORMALISE=normalise,
                WRITE_LABELS=number == 0,
                BLOCK_R=tile.rows,
                BLOCK_D=tile.columns,
                num_warps=tile.warps,
            )
    return slots
