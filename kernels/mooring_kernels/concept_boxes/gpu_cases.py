"""Launches of concept_boxes that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from mooring_kernels.concept_boxes import gpu
from mooring_kernels.concept_boxes.rule import BoxRule, default_group_width, default_rank_stride
from mooring_kernels.runtime.launch_cases import DTYPES, Case, dtype_name

# (D, map side, C): ResNet-50 and ViT-B at 224 pixels; an early stage, whose groups are summed in parts.
_MAPS = ((2048, 7, 200), (768, 14, 200), (512, 56, 2))


def cases() -> Iterator[Case]:
    """Both kernels in both memory formats and both kinds of boxes."""
    for (width, side, classes), dtype in product(_MAPS, DTYPES):
        contiguous = torch.zeros(2, width, side, side, dtype=dtype)
        last = contiguous.to(memory_format=torch.channels_last)
        for name, feature_map, centred in (("NCHW", contiguous, False), ("NHWC", last, True)):
            rule = BoxRule(
                patches=9,
                group_width=default_group_width(width),
                rank_stride=default_rank_stride(width),
                rivals=min(3, classes - 1),
                negatives=classes - 1,
                image_height=224,
                image_width=224,
                patch_side=64,
                centred=centred,
            )
            yield (
                f"map{width}x{side}x{side}-{name}-{dtype_name(dtype)}",
                partial(
                    gpu.concept_boxes_fwd,
                    feature_map,
                    torch.zeros(2, classes, dtype=dtype),
                    torch.zeros(2, dtype=torch.int64),
                    torch.zeros(classes, width),
                    rule,
                ),
            )
