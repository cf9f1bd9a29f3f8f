"""What a benchmarked op is: sizes, inputs, candidates, what it must move and compute.

A byte count is the floor: each input read once, each output written once. Time over that floor says how far a
candidate is from the copy rate of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mooring_kernels.runtime.dispatch import Impl

Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]
Pass = Literal["forward", "backward", "both"]


@dataclass(frozen=True)
class Size:
    """B batch rows, K bank rows, D features, C classes, and letters that only some ops have (0: not there).

    N rows of a queue or of any matrix, P patches or positions, M further rows (negatives, source rows).
    """

    B: int = 0
    K: int = 0
    D: int = 0
    C: int = 0
    N: int = 0
    P: int = 0
    M: int = 0

    def __str__(self) -> str:
        return "-".join(f"{letter}{n}" for letter, n in asdict(self).items() if n)


RESNET50 = Size(B=64, K=2048, D=2048, C=200)
VIT_B = Size(B=64, K=2048, D=768, C=1000)
SIZES = (RESNET50, VIT_B)
QUICK_SIZES = (Size(B=16, K=64, D=48, C=10), Size(B=13, K=91, D=65, C=7))


@dataclass(frozen=True)
class Candidate:
    """One way to compute an op.

    ``call(inputs)`` returns the outputs; gradients are taken through it by autograd. ``compiled`` runs it
    through torch.compile, ``graphed`` replays it from a CUDA graph. ``ours`` is what this package offers in
    place of the others.
    """

    name: str
    call: Callable[[Inputs], Outputs]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    takes: Callable[[Size], bool] = lambda size: True
    compiled: bool = False
    graphed: bool = False
    same_function: bool = True  # False: timed, and its error stored, but not held against the definition
    ours: bool = False


@dataclass(frozen=True)
class Case:
    """A size and a dtype that an op is timed at. At a small one the call itself costs as much as the work."""

    size: Size
    dtype: torch.dtype
    small: bool


@dataclass(frozen=True)
class Operation:
    """One op with everything needed to verify and to time it."""

    name: str
    inputs: Callable[[Size, torch.Generator, torch.dtype], Inputs]
    candidates: tuple[Candidate, ...]
    counted_bytes: Callable[[Size, int, Pass], int]  # (size, bytes per value of the varied dtype, pass)
    counted_flop: Callable[[Size, Pass], int]
    differentiable: tuple[
        str, ...
    ] = ()  # inputs (tensors or lists) whose gradient is taken; empty: forward only
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    amplification: float = 1.0  # how much the op magnifies rounding, for the verify bound
    reads_a_part: bool = False  # what the op looks up decides which of its inputs it needs
    in_place: bool = False  # inputs are written: each call gets a fresh clone when verified
    sizes: tuple[Size, ...] = SIZES
    quick_sizes: tuple[Size, ...] = QUICK_SIZES
    small_sizes: tuple[Size, ...] | None = None  # None: the first of quick_sizes
    longest_sum: Callable[[Size], int] = lambda size: max(
        size.B + size.K, size.D, size.C
    )  # terms; verify bound
    note: str = ""
    step: str = "dr_tune"  # whose training step it is part of, a key of bench.step_share.STEPS; "": of none
    calls_per_step: float = 1.0

    def definition(self, inputs: Inputs) -> Outputs:
        """The reference on the same values in float64."""
        return self.candidates[0].call(as_float64(inputs))

    @property
    def passes(self) -> tuple[Pass, ...]:
        return ("forward", "backward", "both") if self.differentiable else ("forward",)

    @property
    def cases(self) -> tuple[Case, ...]:
        """What is timed, the most telling first: a run whose time is up leaves out the last ones."""
        small = self.quick_sizes[:1] if self.small_sizes is None else self.small_sizes
        main, *other = self.sizes
        ordered = (main, *(s for s in small if s not in self.sizes), *other)
        return tuple(Case(size, dtype, size in small) for size in ordered for dtype in self.dtypes)

    @property
    def quick_cases(self) -> tuple[Case, ...]:
        return tuple(Case(size, dtype, True) for size in self.quick_sizes for dtype in self.dtypes)


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


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def unit_rows(generator: torch.Generator, rows: int, width: int) -> Tensor:
    return torch.nn.functional.normalize(normal(generator, rows, width), dim=1)


def draw_bank(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    """A full bank whose tuned rows are a rotated, noisy image of the frozen ones."""
    frozen = unit_rows(generator, size.K, size.D)
    drift = torch.nn.functional.normalize(frozen + 0.5 * unit_rows(generator, size.K, size.D), dim=1)
    return {
        "frozen": frozen.to(dtype),
        "tuned": drift.to(dtype),
        "labels": torch.randint(0, size.C, (size.K,), generator=generator),
    }


def draw_head(size: Size, generator: torch.Generator) -> Tensor:
    return 0.01 * normal(generator, size.C, size.D)


def implementations(call: Callable[[Inputs, Impl], Outputs]) -> tuple[Candidate, ...]:
    """Eager reference first, then its compiled and graphed forms, then ours; ``auto`` is what a user gets."""

    def with_implementation(name: Impl) -> Callable[[Inputs], Outputs]:
        return lambda inputs: call(inputs, name)

    reference, triton = with_implementation("reference"), with_implementation("triton")
    return (
        Candidate("reference", reference),
        Candidate("compile", reference, compiled=True),
        Candidate("graph", reference, devices=("cuda",), graphed=True),
        Candidate("native", with_implementation("native"), devices=("cpu",), ours=True),
        Candidate("triton", triton, devices=("cuda",), ours=True),
        Candidate("triton graph", triton, devices=("cuda",), graphed=True, ours=True),
        Candidate("auto", with_implementation("auto"), ours=True),
    )
