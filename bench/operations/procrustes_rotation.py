"""Benchmark of procrustes_rotation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

import mooring_kernels as ops
from bench.baselines import dr_tune
from bench.operation import (
    Candidate,
    Inputs,
    Operation,
    Outputs,
    draw_bank,
)


def _operation() -> Operation:
    def call(solver: Literal["auto", "svd", "polar"]) -> Callable[[Inputs], Outputs]:
        return lambda i: (ops.procrustes_rotation(i["frozen"], i["tuned"], i["labels"], solver=solver),)

    return Operation(
        name="procrustes_rotation",
        inputs=draw_bank,
        candidates=(
            Candidate("svd", call("svd")),
            Candidate("polar", call("polar"), ours=True),
            Candidate("auto", call("auto"), ours=True),
            Candidate("public", lambda i: (dr_tune.rotation(i["frozen"], i["tuned"]),), same_function=False),
        ),
        counted_bytes=lambda size, value, _: 2 * size.K * size.D * value + 4 * size.D * size.D,
        counted_flop=lambda size, _: 2 * size.K * size.D**2 + 66 * size.D**3,
        dtypes=(torch.float32,),
        amplification=1e3,  # over the ridge 1e-3: the smallest singular value that decides a direction
        note="FLOP counted for the polar factor by products; the public code has no ridge: another answer",
    )


OPERATIONS = (_operation(),)
