"""Where to crop concept patches: checks and dispatch. No gradient passes."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from mooring_kernels.concept_boxes import reference
from mooring_kernels.concept_boxes.rule import BoxRule, default_group_width, default_rank_stride
from mooring_kernels.runtime.checks import require_floats, require_labels, require_one_device, require_width
from mooring_kernels.runtime.dispatch import Impl, choose

Peak = Literal["corner", "center"]


def concept_boxes(
    feature_map: Tensor,
    logits: Tensor,
    labels: Tensor,
    head_weight: Tensor,
    *,
    image_size: tuple[int, int],
    patches: int = 9,
    group_width: int | None = None,
    rank_stride: int | None = None,
    patch_side: int = 64,
    rivals: int = 3,
    negatives: int = 100,
    peak: Peak = "corner",
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Boxes where groups of channels respond most, and the classes most confused with the label.

    With c_1, c_2, ... the classes other than y_i by falling logit and ``kappa = min(rivals, C - 1)``, channels are
    ranked by falling ``kappa W[y_i] - sum_{j <= kappa} W[c_j]``. Group j holds ranks ``j * rank_stride + t``, t from 0
    to ``group_width - 1``; its channels of F_i are summed, and the cell (row, col) with the largest sum gives the
    point ``(col r_x, row r_y)`` with cells of r = image size / map size pixels. Equal logits and equal scores keep
    the order of their index; of equal sums the lowest flat index wins. No call waits for the device.

    Args:
        feature_map: F, [B, D, H, W] float32 or bfloat16 (float16, float64: reference), in either memory format;
            finite. B may be 0.
        logits: [B, C].
        labels: y, [B] int64. A row whose label is outside 0..C-1 is masked: its boxes are the patch in the middle of
            the image and its negative classes -1; its features are not used.
        head_weight: W, [C, D].
        image_size: (height, width) in pixels of the image to crop.
        patches: P >= 1, groups per image.
        group_width: channels of a group; by default ``max(1, round(30 D / 2048))``.
        rank_stride: ranks from one group to the next; by default ``floor(250 D / 2048)``. The last group must end
            within D.
        patch_side: side of a box in pixels.
        rivals: classes whose prototypes are subtracted.
        negatives: at most this many negative classes are returned.
        peak: ``"corner"`` (public code): the box lies around the top-left corner of the cell and is cut at the image's
            border. ``"center"``: around the middle of the cell, shifted inside the image, so never smaller.
        impl: see ``mooring_kernels``. ``"triton"`` ranks by torch.sort.

    Returns:
        boxes [B, P, 4] float32, x1, y1, x2, y2 in pixels; negative_classes [B, M] int64 with
        ``M = min(negatives, C - 1)``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options do not fit.

    Source: public code of arXiv 2311.06868; there three rivals and sizes for D = 2048 and 224 pixels are fixed.
    Cost: reads (kappa + 1) B D values of W and P group_width H W B of F; ranks B C and B D numbers.
    """
    op = "concept_boxes"
    require_floats(op, "feature_map", feature_map, "B", "D", "H", "W")
    batch, width, rows, columns = feature_map.shape
    require_floats(op, "logits", logits, batch, "C")
    require_labels(op, "labels", labels, batch)
    require_floats(op, "head_weight", head_weight, logits.shape[1], width)
    for name, size in (("D", width), ("H", rows), ("W", columns), ("C", logits.shape[1])):
        require_width(op, name, size)
    require_one_device(op, feature_map=feature_map, logits=logits, labels=labels, head_weight=head_weight)
    rule = _resolved(
        op,
        width,
        logits.shape[1],
        image_size,
        patches,
        group_width,
        rank_stride,
        patch_side,
        rivals,
        negatives,
        peak,
    )
    floats = (feature_map.detach(), logits.detach(), head_weight.detach())
    chosen = choose(op, impl, *floats)
    feature_map, logits, head_weight = floats
    if chosen == "reference":
        return reference.concept_boxes(feature_map, logits, labels, head_weight, rule)
    return _forward(feature_map, logits, labels, head_weight, [int(number) for number in rule], chosen)


def _resolved(
    op: str,
    width: int,
    classes: int,
    image_size: tuple[int, int],
    patches: int,
    group_width: int | None,
    rank_stride: int | None,
    patch_side: int,
    rivals: int,
    negatives: int,
    peak: Peak,
) -> BoxRule:
    if peak not in get_args(Peak):
        raise ValueError(f"{op}: peak must be one of {', '.join(get_args(Peak))}; got {peak!r}")
    group_width = default_group_width(width) if group_width is None else group_width
    rank_stride = default_rank_stride(width) if rank_stride is None else rank_stride
    height, image_width = image_size
    for name, value, least in (
        ("patches", patches, 1),
        ("group_width", group_width, 1),
        ("rank_stride", rank_stride, 0),
        ("patch_side", patch_side, 1),
        ("rivals", rivals, 1),
        ("negatives", negatives, 0),
        ("image height", height, 1),
        ("image width", image_width, 1),
    ):
        if value < least:
            raise ValueError(f"{op}: {name} must be >= {least}; got {value}")
    if (patches - 1) * rank_stride + group_width > width:
        raise ValueError(
            f"{op}: the last group must end within D = {width} channels; {patches} groups of {group_width} with a "
            f"rank_stride of {rank_stride} need {(patches - 1) * rank_stride + group_width}"
        )
    return BoxRule(
        patches,
        group_width,
        rank_stride,
        min(rivals, classes - 1),
        min(negatives, classes - 1),
        height,
        image_width,
        patch_side,
        peak == "center",
    )


@torch.library.custom_op("mooring::concept_boxes", mutates_args=())
def _forward(
    feature_map: Tensor,
    logits: Tensor,
    labels: Tensor,
    head_weight: Tensor,
    rule: list[int],
    impl: str,
) -> tuple[Tensor, Tensor]:
    resolved = BoxRule.of(rule)
    if impl == "triton":
        from mooring_kernels.concept_boxes import gpu

        return gpu.concept_boxes_fwd(feature_map, logits, labels, head_weight, resolved)
    from mooring_kernels.concept_boxes import cpu

    return cpu.concept_boxes_fwd(feature_map, logits, labels, head_weight, resolved)


@_forward.register_fake
def _(
    feature_map: Tensor,
    logits: Tensor,
    labels: Tensor,
    head_weight: Tensor,
    rule: list[int],
    impl: str,
) -> tuple[Tensor, Tensor]:
    resolved, batch = BoxRule.of(rule), feature_map.shape[0]
    boxes = feature_map.new_empty((batch, resolved.patches, 4), dtype=torch.float32)
    return boxes, labels.new_empty((batch, resolved.negatives))
