"""Every benchmarked op, each declared once in ``bench/operations``: tests and benchmarks both read this."""

from __future__ import annotations

from bench.operation import Operation
from bench.operations import (
    bank_cross_entropy,
    batchnorm_statistics,
    calibrate,
    channel_attention,
    class_ring_push,
    class_statistics,
    concept_boxes,
    dr_tune_block,
    ema,
    l2_sp,
    patch_match_info_nce,
    procrustes_rotation,
    queue_info_nce,
    ring_push,
    row_normalise,
    text_supervised_loss,
    two_head_cross_entropy,
)

_DECLARED = (
    row_normalise,
    ring_push,
    class_ring_push,
    class_statistics,
    calibrate,
    procrustes_rotation,
    bank_cross_entropy,
    queue_info_nce,
    text_supervised_loss,
    two_head_cross_entropy,
    dr_tune_block,
    concept_boxes,
    channel_attention,
    ema,
    l2_sp,
    batchnorm_statistics,
    patch_match_info_nce,
)

OPERATIONS: dict[str, Operation] = {
    operation.name: operation for declared in _DECLARED for operation in declared.OPERATIONS
}
