"""Benchmark of class_statistics."""

from __future__ import annotations

import mooring_kernels as ops
from bench.operation import (
    Operation,
    draw_bank,
    draw_head,
    implementations,
)


def _operation() -> Operation:
    return Operation(
        name="class_statistics",
        inputs=lambda size, generator, dtype: {
            **draw_bank(size, generator, dtype),
            "head_weight": draw_head(size, generator),
        },
        candidates=implementations(
            lambda i, impl: ops.class_statistics(
                i["frozen"], i["tuned"], i["labels"], i["head_weight"], impl=impl
            )
        ),
        counted_bytes=lambda size, value, _: 2 * size.K * size.D * value + 12 * size.C * size.D + 8 * size.K,
        counted_flop=lambda size, _: 5 * size.K * size.D + 4 * size.C * size.D,
    )


OPERATIONS = (_operation(),)
