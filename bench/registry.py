"""Every benchmarked op, declared once: sizes, inputs, candidates, what it must move and compute.

A byte count is the floor: each input read once, each output written once. Time over that floor says how far a
candidate is from the copy rate of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import mooring_kernels as ops
from bench.baselines import dr_tune
from mooring_kernels.runtime.dispatch import Impl

Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]
Pass = Literal["forward", "backward", "both"]


@dataclass(frozen=True)
class Size:
    """B batch rows, K bank rows, D features, C classes."""

    B: int
    K: int
    D: int
    C: int

    def __str__(self) -> str:
        return f"B{self.B}-K{self.K}-D{self.D}-C{self.C}"


RESNET50 = Size(B=64, K=2048, D=2048, C=200)
VIT_B = Size(B=64, K=2048, D=768, C=1000)
SIZES = (RESNET50, VIT_B)
QUICK_SIZES = (Size(B=16, K=64, D=48, C=10), Size(B=13, K=91, D=65, C=7))


@dataclass(frozen=True)
class Candidate:
    """One way to compute an op.

    ``call(inputs)`` returns the outputs; gradients are taken through it by autograd. ``compiled`` runs it
    through torch.compile, ``graphed`` replays it from a CUDA graph.
    """

    name: str
    call: Callable[[Inputs], Outputs]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    takes: Callable[[Size], bool] = lambda size: True
    compiled: bool = False
    graphed: bool = False
    same_function: bool = True  # False: timed, and its error stored, but not held against the definition


@dataclass(frozen=True)
class Operation:
    """One op with everything needed to verify and to time it."""

    name: str
    inputs: Callable[[Size, torch.Generator, torch.dtype], Inputs]
    candidates: tuple[Candidate, ...]
    counted_bytes: Callable[[Size, int, Pass], int]  # (size, bytes per value of the varied dtype, pass)
    counted_flop: Callable[[Size, Pass], int]
    differentiable: tuple[str, ...] = ()  # inputs whose gradient is taken; empty: forward only
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    amplification: float = 1.0  # how much the op magnifies rounding, for the verify bound
    in_place: bool = False  # inputs are written: each call gets a fresh clone when verified
    sizes: tuple[Size, ...] = SIZES
    quick_sizes: tuple[Size, ...] = QUICK_SIZES
    note: str = ""

    def definition(self, inputs: Inputs) -> Outputs:
        """The reference on the same values in float64."""
        return self.candidates[0].call(as_float64(inputs))

    @property
    def passes(self) -> tuple[Pass, ...]:
        return ("forward", "backward", "both") if self.differentiable else ("forward",)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in it, in lists and mappings too, replaced by ``change(tensor)``."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [map_tensors(item, change) for item in value]
    if isinstance(value, Mapping):
        return {name: map_tensors(item, change) for name, item in value.items()}
    return value


def as_float64(inputs: Inputs) -> Inputs:
    """Detached float64 copies; integers stay."""
    return map_tensors(inputs, lambda t: t.detach().double() if t.is_floating_point() else t.detach().clone())


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _unit_rows(generator: torch.Generator, rows: int, width: int) -> Tensor:
    return torch.nn.functional.normalize(_normal(generator, rows, width), dim=1)


def _bank(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    """A full bank whose tuned rows are a rotated, noisy image of the frozen ones."""
    frozen = _unit_rows(generator, size.K, size.D)
    drift = torch.nn.functional.normalize(frozen + 0.5 * _unit_rows(generator, size.K, size.D), dim=1)
    return {
        "frozen": frozen.to(dtype),
        "tuned": drift.to(dtype),
        "labels": torch.randint(0, size.C, (size.K,), generator=generator),
    }


def _head(size: Size, generator: torch.Generator) -> Tensor:
    return 0.01 * _normal(generator, size.C, size.D)


def _implementations(call: Callable[[Inputs, Impl], Outputs]) -> tuple[Candidate, ...]:
    """Eager reference first, then its compiled and graphed forms, then ours."""

    def with_implementation(name: Impl) -> Callable[[Inputs], Outputs]:
        return lambda inputs: call(inputs, name)

    reference = with_implementation("reference")
    return (
        Candidate("reference", reference),
        Candidate("compile", reference, compiled=True),
        Candidate("graph", reference, devices=("cuda",), graphed=True),
        Candidate("native", with_implementation("native"), devices=("cpu",)),
        Candidate("triton", with_implementation("triton"), devices=("cuda",)),
    )


def _row_normalise() -> Operation:
    def counted_bytes(size: Size, value: int, which: Pass) -> int:
        forward = 2 * size.K * size.D * value + 4 * size.K
        backward = 3 * size.K * size.D * value + 8 * size.K
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]

    def counted_flop(size: Size, which: Pass) -> int:
        forward, backward = 3 * size.K * size.D, 6 * size.K * size.D
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]

    return Operation(
        name="row_normalise",
        inputs=lambda size, generator, dtype: {"x": _normal(generator, size.K, size.D).to(dtype)},
        candidates=_implementations(lambda i, impl: ops.row_normalise(i["x"], impl=impl)),
        counted_bytes=counted_bytes,
        counted_flop=counted_flop,
        differentiable=("x",),
    )


def _ring_push() -> Operation:
    def inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        bank = _bank(size, generator, dtype)
        return {
            "bank_fields": [bank["frozen"], bank["tuned"]],
            "bank_labels": bank["labels"],
            "fields": [_normal(generator, size.B, size.D) for _ in range(2)],
            "labels": torch.randint(0, size.C, (size.B,), generator=generator),
        }

    def push(i: Inputs, impl: Impl) -> Outputs:
        ops.ring_push_(i["bank_fields"], i["bank_labels"], i["fields"], i["labels"], 0, impl=impl)
        return (*i["bank_fields"], i["bank_labels"])

    def push_public(i: Inputs) -> Outputs:
        dr_tune.enqueue(i["bank_fields"], i["bank_labels"], i["fields"], i["labels"], 0)
        return (*i["bank_fields"], i["bank_labels"])

    return Operation(
        name="ring_push_",
        inputs=inputs,
        candidates=(
            *_implementations(push),
            Candidate("public", push_public, takes=lambda size: size.K % size.B == 0),
        ),
        counted_bytes=lambda size, value, _: 2 * size.B * size.D * (4 + value) + 16 * size.B,
        counted_flop=lambda size, _: 6 * size.B * size.D,
        in_place=True,
        note="head = 0 and B divides K: the public code cannot wrap",
    )


def _class_statistics() -> Operation:
    return Operation(
        name="class_statistics",
        inputs=lambda size, generator, dtype: {
            **_bank(size, generator, dtype),
            "head_weight": _head(size, generator),
        },
        candidates=_implementations(
            lambda i, impl: ops.class_statistics(
                i["frozen"], i["tuned"], i["labels"], i["head_weight"], impl=impl
            )
        ),
        counted_bytes=lambda size, value, _: 2 * size.K * size.D * value + 12 * size.C * size.D + 8 * size.K,
        counted_flop=lambda size, _: 5 * size.K * size.D + 4 * size.C * size.D,
    )


def _calibrate(rotated: bool) -> Operation:
    def inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        turn = torch.linalg.qr(_normal(generator, size.D, size.D))[0] if rotated else None
        return {
            **_bank(size, generator, dtype),
            "head_weight": _head(size, generator),
            "rotation": turn,
            "scale": torch.tensor(17.0),
        }

    def call(i: Inputs, impl: Impl) -> Outputs:
        return (
            ops.calibrate(
                i["frozen"], i["tuned"], i["labels"], i["head_weight"], i["rotation"], i["scale"], impl=impl
            ),
        )

    def call_public(i: Inputs) -> Outputs:
        return (
            dr_tune.calibrate(
                i["frozen"], i["tuned"], i["labels"], i["head_weight"], i["rotation"], i["scale"]
            ),
        )

    def counted_bytes(size: Size, value: int, _: Pass) -> int:
        turn = 4 * size.D * size.D if rotated else 0
        return 2 * size.K * size.D * value + 4 * size.K * size.D + 4 * size.C * size.D + 8 * size.K + turn

    def counted_flop(size: Size, _: Pass) -> int:
        turn = 2 * size.K * size.D * size.D if rotated else 0
        return 11 * size.K * size.D + 4 * size.C * size.D + turn

    return Operation(
        name="calibrate_rotated" if rotated else "calibrate",
        inputs=inputs,
        candidates=(
            *_implementations(call),
            # It normalises its rows again: for rows rounded to bf16 that is another function.
            Candidate("public", call_public, dtypes=(torch.float32,)),
        ),
        counted_bytes=counted_bytes,
        counted_flop=counted_flop,
        amplification=4.0,  # residuals are differences of unit rows and are scaled back up
        note="the public code runs this once per step, with a rotation on every 10th step only",
    )


def _procrustes_rotation() -> Operation:
    def call(solver: Literal["svd", "polar"]) -> Callable[[Inputs], Outputs]:
        return lambda i: (ops.procrustes_rotation(i["frozen"], i["tuned"], i["labels"], solver=solver),)

    return Operation(
        name="procrustes_rotation",
        inputs=_bank,
        candidates=(
            Candidate("svd", call("svd")),
            Candidate("polar", call("polar")),
            Candidate("public", lambda i: (dr_tune.rotation(i["frozen"], i["tuned"]),), same_function=False),
        ),
        counted_bytes=lambda size, value, _: 2 * size.K * size.D * value + 4 * size.D * size.D,
        counted_flop=lambda size, _: 2 * size.K * size.D**2 + 66 * size.D**3,
        dtypes=(torch.float32,),
        amplification=1e3,  # over the ridge 1e-3: the smallest singular value that decides a direction
        note="FLOP counted for the polar factor by products; the public code has no ridge: another answer",
    )


def _bank_cross_entropy() -> Operation:
    def inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        return {
            "features": 17.0 * _unit_rows(generator, size.B, size.D).to(dtype),
            "labels": torch.randint(0, size.C, (size.B,), generator=generator),
            "bank": 17.0 * _unit_rows(generator, size.K, size.D).to(dtype),
            "bank_labels": torch.randint(0, size.C, (size.K,), generator=generator),
            "weight": _head(size, generator).to(dtype),
            "bias": 0.1 * _normal(generator, size.C).to(dtype),
        }

    def arguments(i: Inputs) -> tuple[Any, ...]:
        return i["features"], i["labels"], i["bank"], i["bank_labels"], i["weight"], i["bias"]

    def counted_bytes(size: Size, value: int, which: Pass) -> int:
        rows, head = (size.B + size.K) * size.D, (size.D + 1) * size.C
        forward = value * (rows + head)
        backward = value * (rows + 2 * head + size.B * size.D)
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]

    def counted_flop(size: Size, which: Pass) -> int:
        forward = 2 * (size.B + size.K) * size.D * size.C
        backward = forward + 2 * size.B * size.D * size.C
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]

    return Operation(
        name="bank_cross_entropy",
        inputs=inputs,
        candidates=(
            *_implementations(lambda i, impl: (ops.bank_cross_entropy(*arguments(i), impl=impl),)),
            Candidate("public", lambda i: (dr_tune.loss(*arguments(i)),)),
        ),
        counted_bytes=counted_bytes,
        counted_flop=counted_flop,
        differentiable=("features", "weight", "bias"),
        dtypes=(torch.float32,),
        amplification=4.0,
    )


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        _row_normalise(),
        _ring_push(),
        _class_statistics(),
        _calibrate(rotated=False),
        _calibrate(rotated=True),
        _procrustes_rotation(),
        _bank_cross_entropy(),
    )
}
