"""The crop search by the native module: one pass over an image, no gathered copies."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels import _C
from mooring_kernels.concept_boxes.layout import positions_in_line
from mooring_kernels.concept_boxes.rule import BoxRule
from mooring_kernels.runtime.native import dtype_code, threads


def concept_boxes_fwd(
    feature_map: Tensor, logits: Tensor, labels: Tensor, head_weight: Tensor, rule: BoxRule
) -> tuple[Tensor, Tensor]:
    """A map in channels_last is read where it lies; one whose positions have no single stride is copied."""
    batch, width, rows, columns = feature_map.shape
    feature_map, stride_position = positions_in_line(feature_map)
    logits, labels = logits.float().contiguous(), labels.contiguous()
    head_weight = head_weight.float().contiguous()
    boxes = torch.empty((batch, rule.patches, 4), dtype=torch.float32)
    negative_classes = torch.empty((batch, rule.negatives), dtype=torch.int64)
    *numbers, centred = rule
    _C.concept_boxes(
        feature_map.data_ptr(),
        dtype_code(feature_map),
        (feature_map.stride(0), feature_map.stride(1), stride_position),
        logits.data_ptr(),
        labels.data_ptr(),
        head_weight.data_ptr(),
        (batch, width, rows, columns, head_weight.shape[0]),
        numbers,
        centred,
        boxes.data_ptr(),
        negative_classes.data_ptr(),
        threads(),
    )
    return boxes, negative_classes
