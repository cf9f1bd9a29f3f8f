"""Benchmarks of the DR-Tune block: a step between two refreshes of the rotation, and the refresh.

A step of training costs the first plus a T-th (T = 10) of the second. The op under test keeps rotated rows: its
step rotates the B new ones, its refresh all K; `head` is given the rotation in every step instead, and the
vectorised baselines rotate all K rows in every step. The public code rotates nothing between its refreshes, which
is another function; there its rotation of K rows belongs to the refresh.
"""

from __future__ import annotations

import torch

import mooring_kernels as ops
from bench.baselines import dr_tune
from bench.operation import (
    Candidate,
    Inputs,
    Operation,
    Outputs,
    Pass,
    Size,
    draw_bank,
    draw_head,
    implementations,
    normal,
)
from mooring_kernels.runtime.dispatch import Impl


def _inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    bank = draw_bank(size, generator, dtype)
    turn = torch.linalg.qr(normal(generator, size.D, size.D))[0]
    return {
        **bank,
        "rotated": bank["frozen"].float() @ turn.T,
        "features": normal(generator, size.B, size.D),
        "batch_labels": torch.randint(0, size.C, (size.B,), generator=generator),
        "weight": draw_head(size, generator),
        "bias": 0.1 * normal(generator, size.C),
        "rotation": turn,
        "scale": torch.tensor(17.0),
    }


def _loss(i: Inputs, frozen: torch.Tensor, turn: torch.Tensor | None, impl: Impl) -> Outputs:
    return (
        ops.dr_tune_loss(
            i["features"],
            i["batch_labels"],
            frozen,
            i["tuned"],
            i["labels"],
            i["weight"],
            i["bias"],
            turn,
            i["scale"],
            impl=impl,
        ),
    )


def _step_of(i: Inputs, impl: Impl) -> Outputs:
    """Ours rotates the new rows into the kept ones: here the first B slots, which hold the same values."""
    if impl == "reference":
        return _loss(i, i["frozen"], i["rotation"], impl)
    batch = i["features"].shape[0]
    i["rotated"][:batch] = i["frozen"][:batch].float() @ i["rotation"].T
    return _loss(i, i["rotated"], None, impl)


def _public(i: Inputs) -> Outputs:
    calibrated = dr_tune.calibrate(
        i["frozen"], i["tuned"], i["labels"], i["weight"].detach(), None, i["scale"]
    )
    arguments = i["features"], i["batch_labels"], calibrated, i["labels"], i["weight"], i["bias"]
    return (dr_tune.loss(*arguments),)


def _step() -> Operation:
    def counted_bytes(size: Size, value: int, which: Pass) -> int:
        # both banks, and the rotated rows that stand for the frozen ones
        rows = size.K * size.D * (2 * value + 4) + size.B * size.D * (4 if which == "forward" else 8)
        head = 4 * (size.D + 1) * size.C * (1 if which == "forward" else 2)
        return rows + head + 4 * size.D * size.D

    def counted_flop(size: Size, which: Pass) -> int:
        forward = 2 * (size.B + size.K) * size.D * size.C + 2 * size.B * size.D * size.D
        backward = 2 * (2 * size.B + size.K) * size.D * size.C
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]

    return Operation(
        name="dr_tune_block",
        inputs=_inputs,
        candidates=(
            *implementations(_step_of),
            Candidate("head", lambda i: _loss(i, i["frozen"], i["rotation"], "auto"), ours=True),
            Candidate("public", _public, same_function=False),
        ),
        counted_bytes=counted_bytes,
        counted_flop=counted_flop,
        differentiable=("features", "weight", "bias"),
        dtypes=(torch.float32,),
        amplification=8.0,
        note="a step between refreshes; gradients are formed with the loss: hold `both` against the others",
    )


def _refresh() -> Operation:
    def call(i: Inputs, impl: Impl) -> Outputs:
        turn = ops.procrustes_rotation(i["frozen"], i["tuned"], i["labels"], impl=impl)
        return (i["frozen"].to(turn.dtype) @ turn.T,)

    def public(i: Inputs) -> Outputs:
        return (i["frozen"].float() @ dr_tune.rotation(i["frozen"], i["tuned"]).T,)

    return Operation(
        name="dr_tune_refresh",
        inputs=draw_bank,
        candidates=(
            Candidate("reference", lambda i: call(i, "reference")),
            Candidate("auto", lambda i: call(i, "auto"), ours=True),
            Candidate("public", public, same_function=False),
        ),
        counted_bytes=lambda size, value, _: 2 * size.K * size.D * value + 4 * size.K * size.D,
        counted_flop=lambda size, _: 4 * size.K * size.D**2,
        dtypes=(torch.float32,),
        amplification=2000.0,  # the ridge is 1e-3: the rotation divides rounding by it
        calls_per_step=0.1,
        note="rotation from scratch and all K rows rotated; a training step pays a T-th of it",
    )


OPERATIONS = (_step(), _refresh())
