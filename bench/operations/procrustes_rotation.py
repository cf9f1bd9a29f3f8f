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
    def call(solver: Literal["auto", "svd", "newton", "polar"]) -> Callable[[Inputs], Outputs]:
        return lambda i: (ops.procrustes_rotation(i["frozen"], i["tuned"], i["labels"], solver=solver),)

    def factorisation(i: Inputs) -> Outputs:
        left, _, right = torch.linalg.svd(i["tuned"].float().T @ i["frozen"].float())
        return (left @ right,)

    return Operation(
        name="procrustes_rotation",
        inputs=draw_bank,
        candidates=(
            Candidate("svd", call("svd")),
            Candidate("newton", call("newton"), devices=("cpu",), ours=True),
            Candidate("polar", call("polar"), ours=True),
            Candidate("auto", call("auto"), ours=True),
            # Product, one SVD, product: less than any SVD form of the op needs.
            Candidate("torch_svd", factorisation, same_function=False),
            Candidate("public", lambda i: (dr_tune.rotation(i["frozen"], i["tuned"]),), same_function=False),
        ),
        counted_bytes=lambda size, value, _: 2 * size.K * size.D * value + 4 * size.D * size.D,
        counted_flop=lambda size, _: 2 * size.K * size.D**2 + 12 * size.D**3,
        dtypes=(torch.float32,),
        amplification=1e3,  # over the ridge 1e-3: the smallest singular value that decides a direction
        note="FLOP counted for newton (two inverses, a Gram matrix, five definite inverses, a product); "
        "the public code has no ridge: another answer",
    )


OPERATIONS = (_operation(),)
