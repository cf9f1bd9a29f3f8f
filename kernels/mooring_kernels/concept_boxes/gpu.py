"""Triton kernels of the crop search. Both rankings are torch.sort: a radix sort that no kernel here beats."""

# Triton's types know neither the launch options (num_warps) nor the element type of a pointer.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mooring_kernels.concept_boxes.layout import positions_in_line
from mooring_kernels.concept_boxes.reference import other_classes
from mooring_kernels.concept_boxes.rule import BoxRule
from mooring_kernels.runtime.triton_launch import next_power_of_two, on_device_of, warps_for

_SCORE_BLOCK = 512  # channels per program: four 16-byte loads a thread at 2 warps
_TILE = 2048  # values of the map in registers at once
_WIDEST_GROUP_TILE = 32


@triton.jit
def concept_scores_fwd_kernel(
    labels_ptr: tl.tensor,
    others_ptr: tl.tensor,
    head_weight_ptr: tl.tensor,
    score_ptr: tl.tensor,
    C: tl.constexpr,
    D: tl.constexpr,
    RIVALS: tl.constexpr,
    stride_labels_b: tl.constexpr,
    stride_others_b: tl.constexpr,
    stride_head_weight_c: tl.constexpr,
    stride_head_weight_d: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    label = tl.load(labels_ptr + i * stride_labels_b)
    inside = (channels < D) & (label >= 0) & (label < C)  # a masked row reads no prototype
    column_ptr = head_weight_ptr + channels * stride_head_weight_d
    own = tl.load(column_ptr + label * stride_head_weight_c, mask=inside, other=0.0)
    score = RIVALS * own.to(tl.float32)  # [BLOCK_D]
    for j in range(RIVALS):
        rival = tl.load(others_ptr + i * stride_others_b + j)
        prototype = tl.load(column_ptr + rival * stride_head_weight_c, mask=inside, other=0.0)
        score -= prototype.to(tl.float32)
    tl.store(score_ptr + i * D + channels, score, mask=channels < D)


@triton.jit
def concept_peak_fwd_kernel(
    feature_map_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    rank_ptr: tl.tensor,
    boxes_ptr: tl.tensor,
    patch_side: float,
    image_height: float,
    image_width: float,
    cell_height: float,
    cell_width: float,
    C: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PATCHES: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    RANK_STRIDE: tl.constexpr,
    CENTRED: tl.constexpr,
    stride_map_b: tl.constexpr,
    stride_map_d: tl.constexpr,
    stride_map_n: tl.constexpr,
    stride_labels_b: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1)
    label = tl.load(labels_ptr + i * stride_labels_b)
    valid = (label >= 0) & (label < C)
    positions = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    response = tl.zeros([BLOCK_N], dtype=tl.float32)
    for begin in range(0, GROUP_WIDTH, BLOCK_G):
        member = begin + tl.arange(0, BLOCK_G)  # [BLOCK_G]
        taken = (member < GROUP_WIDTH) & valid
        channel = tl.load(rank_ptr + i * D + j * RANK_STRIDE + member, mask=taken, other=0)  # [BLOCK_G]
        value = tl.load(
            feature_map_ptr
            + i * stride_map_b
            + channel[:, None] * stride_map_d
            + positions[None, :] * stride_map_n,
            mask=taken[:, None] & (positions < POSITIONS)[None, :],
            other=0.0,
        ).to(tl.float32)  # [BLOCK_G, BLOCK_N]
        response += tl.sum(value, axis=0)
    response = tl.where(positions < POSITIONS, response, float("-inf"))
    peak = tl.argmax(response, axis=0, tie_break_left=True)

    x = (peak % COLUMNS).to(tl.float32)
    y = (peak // COLUMNS).to(tl.float32)
    if CENTRED:
        x += 0.5
        y += 0.5
    x = tl.where(valid, x * cell_width, 0.5 * image_width)
    y = tl.where(valid, y * cell_height, 0.5 * image_height)
    left = x - 0.5 * patch_side
    top = y - 0.5 * patch_side
    # a centred box, and that of a masked row, is shifted inside the image; the others are cut
    shifted_left = tl.maximum(tl.minimum(left, tl.maximum(image_width - patch_side, 0.0)), 0.0)
    shifted_top = tl.maximum(tl.minimum(top, tl.maximum(image_height - patch_side, 0.0)), 0.0)
    if CENTRED:
        left = shifted_left
        top = shifted_top
    left = tl.where(valid, left, shifted_left)
    top = tl.where(valid, top, shifted_top)
    box_ptr = boxes_ptr + (i * PATCHES + j) * 4
    tl.store(box_ptr, tl.maximum(left, 0.0))
    tl.store(box_ptr + 1, tl.maximum(top, 0.0))
    tl.store(box_ptr + 2, tl.minimum(left + patch_side, image_width))
    tl.store(box_ptr + 3, tl.minimum(top + patch_side, image_height))


def concept_boxes_fwd(
    feature_map: Tensor, logits: Tensor, labels: Tensor, head_weight: Tensor, rule: BoxRule
) -> tuple[Tensor, Tensor]:
    """Boxes of the peaks of the channel groups, and the classes most confused with the label.

    Args:
        feature_map: [B, D, H, W] fp32 or bf16; copied unless its positions have one stride, as in the two
            usual memory formats.
        logits: [B, C].
        labels: [B] int64; a row whose label lies outside [0, C) reads nothing.
        head_weight: [C, D], any strides.
        rule: the search, resolved.

    Returns:
        boxes [B, P, 4] fp32; negative_classes [B, M] int64.
    """
    batch, width, rows, columns = feature_map.shape
    feature_map, stride_position = positions_in_line(feature_map)
    others = other_classes(logits.float(), labels, max(rule.rivals, rule.negatives))
    score = torch.empty((batch, width), dtype=torch.float32, device=feature_map.device)
    boxes = torch.empty((batch, rule.patches, 4), dtype=torch.float32, device=feature_map.device)
    if batch == 0:
        return boxes, others[:, : rule.negatives]
    block_d = min(next_power_of_two(width), _SCORE_BLOCK)
    block_n = next_power_of_two(rows * columns)
    block_g = min(next_power_of_two(rule.group_width), max(_TILE // block_n, 1), _WIDEST_GROUP_TILE)
    with on_device_of(feature_map):
        concept_scores_fwd_kernel[(batch, triton.cdiv(width, block_d))](
            labels,
            others,
            head_weight,
            score,
            C=head_weight.shape[0],
            D=width,
            RIVALS=rule.rivals,
            stride_labels_b=labels.stride(0),
            stride_others_b=others.stride(0),
            stride_head_weight_c=head_weight.stride(0),
            stride_head_weight_d=head_weight.stride(1),
            BLOCK_D=block_d,
            num_warps=warps_for(2 * block_d),
            enable_fp_fusion=False,  # the scores of the other implementations bit for bit: ties stay ties
        )
        rank = score.argsort(dim=1, descending=True, stable=True)
        concept_peak_fwd_kernel[(batch, rule.patches)](
            feature_map,
            labels,
            rank,
            boxes,
            float(rule.patch_side),
            float(rule.image_height),
            float(rule.image_width),
            rule.image_height / rows,
            rule.image_width / columns,
            C=head_weight.shape[0],
            D=width,
            COLUMNS=columns,
            POSITIONS=rows * columns,
            PATCHES=rule.patches,
            GROUP_WIDTH=rule.group_width,
            RANK_STRIDE=rule.rank_stride,
            CENTRED=rule.centred,
            stride_map_b=feature_map.stride(0),
            stride_map_d=feature_map.stride(1),
            stride_map_n=stride_position,
            stride_labels_b=labels.stride(0),
            BLOCK_G=block_g,
            BLOCK_N=block_n,
            num_warps=warps_for(block_g * block_n),
        )
    return boxes, others[:, : rule.negatives].contiguous()
