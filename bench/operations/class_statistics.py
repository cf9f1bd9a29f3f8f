"""Benchmark of class_statistics."""

from __future__ import annotations

import mooring_kernels as ops
from bench.operation import (
    SIZES,
    Operation,
    Size,
    draw_bank,
    draw_head,
    implementations,
)


def _operation() -> Operation:
    return Operation(
        name="class_statistics",
        sizes=(*SIZES, Size(B=64, K=16384, D=2048, C=1000)),  # 268 MB of banks: no cache holds them
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
