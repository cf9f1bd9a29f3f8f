"""Kernel tests: where they run, memory that betrays unwritten results, an interpreter right for bf16."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

ON_GPU = os.environ.get("MOORING_GPU") == "1"


def _repair_bf16_in_interpreter() -> None:
    """Makes casts and dots of bf16 exact in Triton's interpreter.

    It keeps bf16 as uint16: fp32 -> bf16 truncates where a GPU rounds to nearest even, and a dot of bf16
    multiplies bit patterns. (bf16 arithmetic stays wrong; kernels here convert to fp32 after every load.)
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    original_cast, original_dot = builder.cast_impl, builder.create_dot

    def round_to_nearest_even(values: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(is_nan, ((bits >> 16) | 0x40).astype(np.uint16), rounded.astype(np.uint16))

    def widen(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        from_type, to_type = source.dtype.scalar, target.scalar
        if from_type == tl.float32 and to_type == tl.bfloat16:
            return interpreter.TensorHandle(round_to_nearest_even(source.data), to_type)
        if from_type == tl.bfloat16 and to_type == tl.float32:
            return interpreter.TensorHandle(widen(source.data), to_type)
        return original_cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        def as_fp32(handle: Any) -> Any:
            if handle.dtype.scalar == tl.bfloat16:
                return interpreter.TensorHandle(widen(handle.data), tl.float32)
            return handle

        return original_dot(self, as_fp32(a), as_fp32(b), accumulator, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    for name in ("create_fp_ext", "create_fp_trunc", "create_si_to_fp", "create_fp_to_si"):
        setattr(builder, name, lambda self, source, target: cast_impl(self, source, target))


if not ON_GPU:
    with suppress(ModuleNotFoundError):  # without Triton its tests skip, and the others do not need it
        _repair_bf16_in_interpreter()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """CUDA with MOORING_GPU=1, else the CPU, where Triton kernels run in the interpreter."""
    if not ON_GPU:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("MOORING_GPU=1, but torch sees no CUDA device")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills every fresh ``torch.empty`` with NaN (integers: the largest value): an unwritten result shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled_before
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def generator() -> torch.Generator:
    """Seeded source of random numbers on the CPU: the same inputs on every device."""
    return torch.Generator().manual_seed(20240229)


Guard = Callable[[Tensor], Tensor]
_MARGIN = 64  # elements before and after; 64 of any dtype keep the 16-byte alignment that vector loads need
_CANARY = 119


@pytest.fixture
def guard() -> Iterator[Guard]:
    """Copies a tensor into the middle of a larger block; the test fails if anything around it was written.

    Out-of-bounds stores of an interpreted kernel land silently in neighbouring memory: here that is known.
    """
    blocks: list[tuple[Tensor, int]] = []

    def surround(tensor: Tensor) -> Tensor:
        size = tensor.numel()
        block = torch.full((size + 2 * _MARGIN,), _CANARY, dtype=tensor.dtype, device=tensor.device)
        inner = block[_MARGIN : _MARGIN + size].view(tensor.shape)
        inner.copy_(tensor)
        blocks.append((block, size))
        return inner

    yield surround
    for block, size in blocks:
        assert torch.all(block[:_MARGIN] == _CANARY), "a kernel wrote before the start of a tensor"
        assert torch.all(block[_MARGIN + size :] == _CANARY), "a kernel wrote past the end of a tensor"


@pytest.fixture
def guarded_empty(monkeypatch: pytest.MonkeyPatch, guard: Guard) -> None:
    """Surrounds every ``torch.empty`` and ``torch.empty_like`` of the code under test with canaries."""
    empty = torch.empty

    def empty_between_canaries(*size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return guard(empty(*size, dtype=dtype, device=device))

    monkeypatch.setattr(torch, "empty", empty_between_canaries)
    monkeypatch.setattr(
        torch, "empty_like", lambda like: guard(empty(like.shape, dtype=like.dtype, device=like.device))
    )


Check = Callable[..., None]


@pytest.fixture
def assert_within() -> Check:
    """Compares with a float64 definition under one error model.

    ``|actual - expected| <= operations * u32 * magnitude + u_stored * |expected|``: each of ``operations``
    dependent fp32 operations rounds an intermediate of size ``magnitude`` (u32 = 2^-24), and the store rounds
    once more to the dtype of ``actual``.
    """

    def check(
        actual: Tensor, expected: Tensor, *, operations: float, magnitude: float | Tensor = 1.0
    ) -> None:
        assert actual.shape == expected.shape
        expected = expected.to(device="cpu", dtype=torch.float64)
        error = (actual.to(device="cpu", dtype=torch.float64) - expected).abs()
        if isinstance(magnitude, Tensor):
            magnitude = magnitude.to(device="cpu", dtype=torch.float64)
        unit_roundoff = torch.finfo(actual.dtype).eps / 2
        bound = operations * 2.0**-24 * magnitude + unit_roundoff * expected.abs()
        # Subnormals: bf16 and fp32 share their smallest normal number, below which rounding is absolute.
        excess = error - (bound + torch.finfo(torch.float32).tiny)
        assert not error.isnan().any(), "NaN: a result was not written, or a masked row was read"
        assert excess.max().item() <= 0.0 if excess.numel() else True, (
            f"largest error {error.max().item():.3g}, over its bound by {excess.max().item():.3g}"
        )

    return check
