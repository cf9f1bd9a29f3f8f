"""Benchmark of row_normalise."""

from __future__ import annotations

import mooring_kernels as ops
from bench.operation import (
    SIZES,
    Operation,
    Pass,
    Size,
    implementations,
    normal,
)


def _operation() -> Operation:
    def counted_bytes(size: Size, value: int, which: Pass) -> int:
        forward = 2 * size.K * size.D * value + 4 * size.K
        backward = 3 * size.K * size.D * value + 8 * size.K
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]

    def counted_flop(size: Size, which: Pass) -> int:
        forward, backward = 3 * size.K * size.D, 6 * size.K * size.D
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]

    return Operation(
        name="row_normalise",
        sizes=(*SIZES, Size(K=65536, D=1024)),  # 268 MB: no cache holds them
        inputs=lambda size, generator, dtype: {"x": normal(generator, size.K, size.D).to(dtype)},
        candidates=implementations(lambda i, impl: ops.row_normalise(i["x"], impl=impl)),
        counted_bytes=counted_bytes,
        counted_flop=counted_flop,
        differentiable=("x",),
    )


OPERATIONS = (_operation(),)
