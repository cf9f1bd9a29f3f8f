"""Every benchmarked op, each declared once in ``bench/operations``: tests and benchmarks both read this."""

from __future__ import annotations

from bench.operation import Operation
from bench.operations import (
    bank_cross_entropy,
    calibrate,
    class_statistics,
    dr_tune_block,
    procrustes_rotation,
    ring_push,
    row_normalise,
    text_supervised_loss,
    two_head_cross_entropy,
)

_DECLARED = (
    row_normalise,
    ring_push,
    class_statistics,
    calibrate,
    procrustes_rotation,
    bank_cross_entropy,
    text_supervised_loss,
    two_head_cross_entropy,
    dr_tune_block,
)

OPERATIONS: dict[str, Operation] = {
    operation.name: operation for declared in _DECLARED for operation in declared.OPERATIONS
}
