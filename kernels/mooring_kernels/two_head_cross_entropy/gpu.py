"""Cross-entropy of two heads in Triton: one launch walks the rows of both, each with its own width and factor."""

# Triton's types know neither the launch options (num_warps) nor that a kernel's own function returns.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mooring_kernels.runtime.row_mean import mean_of_valid_rows
from mooring_kernels.runtime.triton_launch import blocked_row_tile, on_device_of
from mooring_kernels.two_head_cross_entropy.tiles import cross_entropy_bwd_tile, cross_entropy_fwd_tile

_MEAN_BLOCK = 512


@triton.jit(do_not_specialize=["B", "S"])
def two_head_cross_entropy_fwd_kernel(
    target_logits_ptr: tl.tensor,
    target_labels_ptr: tl.tensor,
    source_logits_ptr: tl.tensor,
    source_labels_ptr: tl.tensor,
    loss_rows_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    B: int,
    S: int,
    label_smoothing: float,
    C: tl.constexpr,
    C_S: tl.constexpr,
    stride_target_logits_n: tl.constexpr,
    stride_target_logits_c: tl.constexpr,
    stride_target_labels_n: tl.constexpr,
    stride_source_logits_n: tl.constexpr,
    stride_source_logits_c: tl.constexpr,
    stride_source_labels_n: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C_S: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    target_tiles = tl.cdiv(B, BLOCK_B)
    if program < target_tiles:
        cross_entropy_fwd_tile(
            target_logits_ptr,
            target_labels_ptr,
            loss_rows_ptr,
            lse_ptr,
            B,
            label_smoothing,
            C,
            stride_target_logits_n,
            stride_target_logits_c,
            stride_target_labels_n,
            SMOOTHED,
            program,
            BLOCK_B,
            BLOCK_C,
        )
    else:
        cross_entropy_fwd_tile(
            source_logits_ptr,
            source_labels_ptr,
            loss_rows_ptr + B,
            lse_ptr + B,
            S,
            label_smoothing,
            C_S,
            stride_source_logits_n,
            stride_source_logits_c,
            stride_source_labels_n,
            SMOOTHED,
            program - target_tiles,
            BLOCK_S,
            BLOCK_C_S,
        )


@triton.jit(do_not_specialize=["B", "S", "C", "C_S"])
def two_head_cross_entropy_mean_kernel(
    loss_rows_ptr: tl.tensor,
    target_labels_ptr: tl.tensor,
    source_labels_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    target_loss_ptr: tl.tensor,
    source_loss_ptr: tl.tensor,
    inverse_counts_ptr: tl.tensor,
    B: int,
    S: int,
    C: int,
    C_S: int,
    number: float,
    stride_target_labels_n: tl.constexpr,
    stride_source_labels_n: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    target, target_inverse = mean_of_valid_rows(
        loss_rows_ptr, target_labels_ptr, stride_target_labels_n, B, C, BLOCK
    )
    source, source_inverse = mean_of_valid_rows(
        loss_rows_ptr + B, source_labels_ptr, stride_source_labels_n, S, C_S, BLOCK
    )
    weight = number
    if weight_ptr is not None:
        weight = tl.load(weight_ptr).to(tl.float32)
    tl.store(loss_ptr, target + weight * source)
    tl.store(target_loss_ptr, target)
    tl.store(source_loss_ptr, source)
    tl.store(inverse_counts_ptr, target_inverse)
    tl.store(inverse_counts_ptr + 1, source_inverse)


@triton.jit
def _upstream(grad_ptr: tl.tensor) -> tl.tensor:
    grad = 0.0
    if grad_ptr is not None:
        grad = tl.load(grad_ptr).to(tl.float32)
    return grad


@triton.jit(do_not_specialize=["target_programs", "B", "S"])
def two_head_cross_entropy_bwd_kernel(
    target_logits_ptr: tl.tensor,
    target_labels_ptr: tl.tensor,
    source_logits_ptr: tl.tensor,
    source_labels_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    grad_loss_ptr: tl.tensor,
    grad_target_loss_ptr: tl.tensor,
    grad_source_loss_ptr: tl.tensor,
    inverse_counts_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    grad_target_logits_ptr: tl.tensor,
    grad_source_logits_ptr: tl.tensor,
    target_programs: int,
    B: int,
    S: int,
    number: float,
    label_smoothing: float,
    C: tl.constexpr,
    C_S: tl.constexpr,
    stride_target_logits_n: tl.constexpr,
    stride_target_logits_c: tl.constexpr,
    stride_target_labels_n: tl.constexpr,
    stride_source_logits_n: tl.constexpr,
    stride_source_logits_c: tl.constexpr,
    stride_source_labels_n: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C_S: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    both = _upstream(grad_loss_ptr)
    if program < target_programs:
        if grad_target_logits_ptr is not None:  # else no program is a target's
            blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
            cross_entropy_bwd_tile(
                target_logits_ptr,
                target_labels_ptr,
                lse_ptr,
                grad_target_logits_ptr,
                (both + _upstream(grad_target_loss_ptr)) * tl.load(inverse_counts_ptr),
                B,
                label_smoothing,
                C,
                stride_target_logits_n,
                stride_target_logits_c,
                stride_target_labels_n,
                C,
                program // blocks,
                program % blocks,
                BLOCK_B,
                BLOCK_C,
            )
    else:
        if grad_source_logits_ptr is not None:
            weight = number
            if weight_ptr is not None:
                weight = tl.load(weight_ptr).to(tl.float32)
            source_blocks: tl.constexpr = (C_S + BLOCK_C_S - 1) // BLOCK_C_S
            cross_entropy_bwd_tile(
                source_logits_ptr,
                source_labels_ptr,
                lse_ptr + B,
                grad_source_logits_ptr,
                (both * weight + _upstream(grad_source_loss_ptr)) * tl.load(inverse_counts_ptr + 1),
                S,
                label_smoothing,
                C_S,
                stride_source_logits_n,
                stride_source_logits_c,
                stride_source_labels_n,
                C_S,
                (program - target_programs) // source_blocks,
                (program - target_programs) % source_blocks,
                BLOCK_S,
                BLOCK_C_S,
            )


def two_head_cross_entropy_mean(
    loss_rows: Tensor,
    target_labels: Tensor,
    source_labels: Tensor,
    classes: tuple[int, int],
    weight: Tensor | None,
    number: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted sum of both heads' means, both means, 0-d fp32, and 1 / (number of valid rows) of each, [2].

    Args:
        loss_rows: [B + S] fp32, the target's rows first.
        target_labels: [B]. source_labels: [S]. classes: of the target and of the source head.
        weight, number: of the source loss; ``number`` counts where ``weight`` is None.
    """
    # three tensors: outputs of an operator must not share memory
    loss, target_loss, source_loss = (
        torch.empty((), dtype=torch.float32, device=loss_rows.device) for _ in range(3)
    )
    inverse_counts = torch.empty(2, dtype=torch.float32, device=loss_rows.device)
    with on_device_of(loss_rows):
        two_head_cross_entropy_mean_kernel[(1,)](
            loss_rows,
            target_labels,
            source_labels,
            weight,
            loss,
            target_loss,
            source_loss,
            inverse_counts,
            target_labels.shape[0],
            source_labels.shape[0],
            *classes,
            float(number),
            stride_target_labels_n=target_labels.stride(0),
            stride_source_labels_n=source_labels.stride(0),
            BLOCK=_MEAN_BLOCK,
            num_warps=4,
        )
    return loss, target_loss, source_loss, inverse_counts


def two_head_cross_entropy_fwd(
    target_logits: Tensor,
    target_labels: Tensor,
    source_logits: Tensor,
    source_labels: Tensor,
    weight: Tensor | None,
    number: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The three losses, and what their backward needs.

    Args:
        target_logits: [B, C] fp32 or bf16, any strides. source_logits: [S, C_S], likewise.
        target_labels: [B]. source_labels: [S]; a row whose label is no class of its head is not read.
        weight, number: of the source loss; ``number`` counts where ``weight`` (0-d, on the device) is None.
        label_smoothing: mass spread evenly over the classes of each head.

    Returns:
        loss, target loss, source loss, 0-d fp32; 1 / (number of valid rows) [2]; log-sum-exps [B + S].
    """
    (batch, classes), (source_rows, source_classes) = target_logits.shape, source_logits.shape
    loss_rows = torch.empty(batch + source_rows, dtype=torch.float32, device=target_logits.device)
    lse = torch.empty_like(loss_rows)
    tile, source_tile = blocked_row_tile(classes), blocked_row_tile(source_classes)
    programs = triton.cdiv(batch, tile.rows) + triton.cdiv(source_rows, source_tile.rows)
    if programs:
        with on_device_of(target_logits):
            two_head_cross_entropy_fwd_kernel[(programs,)](
                target_logits,
                target_labels,
                source_logits,
                source_labels,
                loss_rows,
                lse,
                batch,
                source_rows,
                float(label_smoothing),
                C=classes,
                C_S=source_classes,
                stride_target_logits_n=target_logits.stride(0),
                stride_target_logits_c=target_logits.stride(1),
                stride_target_labels_n=target_labels.stride(0),
                stride_source_logits_n=source_logits.stride(0),
                stride_source_logits_c=source_logits.stride(1),
                stride_source_labels_n=source_labels.stride(0),
                SMOOTHED=label_smoothing != 0.0,
                BLOCK_B=tile.rows,
                BLOCK_C=tile.columns,
                BLOCK_S=source_tile.rows,
                BLOCK_C_S=source_tile.columns,
                num_warps=max(tile.warps, source_tile.warps),
            )
    means = two_head_cross_entropy_mean(
        loss_rows, target_labels, source_labels, (classes, source_classes), weight, number
    )
    return *means, lse


def two_head_cross_entropy_bwd(
    target_logits: Tensor,
    target_labels: Tensor,
    source_logits: Tensor,
    source_labels: Tensor,
    lse: Tensor,
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
    inverse_counts: Tensor,
    weight: Tensor | None,
    number: float,
    label_smoothing: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of both logits in their dtypes, contiguous, zero on masked rows.

    Args:
        target_logits, target_labels, source_logits, source_labels, weight, number, label_smoothing: as in the
            forward.
        lse, inverse_counts: from the forward.
        upstream: gradients of loss, target loss and source loss, 0-d on the same device; None where there is none.
        needs: which of the two gradients to compute; the other is an empty tensor.
    """
    (batch, classes), (source_rows, source_classes) = target_logits.shape, source_logits.shape
    device = target_logits.device
    shapes = [
        x.shape if needed else (0,) for x, needed in zip((target_logits, source_logits), needs, strict=True)
    ]
    grad_target = torch.empty(shapes[0], dtype=target_logits.dtype, device=device)
    grad_source = torch.empty(shapes[1], dtype=source_logits.dtype, device=device)
    tile, source_tile = blocked_row_tile(classes), blocked_row_tile(source_classes)
    target_programs = triton.cdiv(batch, tile.rows) * triton.cdiv(classes, tile.columns) * needs[0]
    source_programs = (
        triton.cdiv(source_rows, source_tile.rows)
        * triton.cdiv(source_classes, source_tile.columns)
        * needs[1]
    )
    if target_programs + source_programs == 0:
        return grad_target, grad_source
    with on_device_of(target_logits):
        two_head_cross_entropy_bwd_kernel[(target_programs + source_programs,)](
            target_logits,
            target_labels,
            source_logits,
            source_labels,
            lse,
            *upstream,
            inverse_counts,
            weight,
            grad_target if needs[0] else None,
            grad_source if needs[1] else None,
            target_programs,
            batch,
            source_rows,
            float(number),
            float(label_smoothing),
            C=classes,
            C_S=source_classes,
            stride_target_logits_n=target_logits.stride(0),
            stride_target_logits_c=target_logits.stride(1),
            stride_target_labels_n=target_labels.stride(0),
            stride_source_logits_n=source_logits.stride(0),
            stride_source_logits_c=source_logits.stride(1),
            stride_source_labels_n=source_labels.stride(0),
            BLOCK_B=tile.rows,
            BLOCK_C=tile.columns,
            BLOCK_S=source_tile.rows,
            BLOCK_C_S=source_tile.columns,
            num_warps=max(tile.warps, source_tile.warps),
        )
    return grad_target, grad_source
