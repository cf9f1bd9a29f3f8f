"""Row normalisation: checks, dispatch and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mooring_kernels.row_normalise import reference
from mooring_kernels.runtime.checks import require_floats, require_width
from mooring_kernels.runtime.dispatch import Impl, choose


def row_normalise(x: Tensor, eps: float = 1e-12, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """``unit_i = x_i / max(norm_i, eps)``, ``norm_i = |x_i|`` for every row.

    Both outputs carry gradient. A row shorter than ``eps`` is divided by ``eps``; a zero row stays zero and
    its norm passes no gradient.

    Args:
        x: [N, D] float32 or bfloat16 (float16, float64: reference).
        eps: smallest divisor, > 0.
        impl: see ``mooring_kernels``.

    Returns:
        unit [N, D] in the dtype of ``x``; norm [N] float32 (float64 for float64 input).

    Raises:
        ValueError, TypeError: wrong shape, dtype or ``eps``.

    Cost: reads and writes N D elements once forward, reads 2 N D and writes N D backward; 3 N D FLOP forward.
    """
    require_floats("row_normalise", "x", x, "N", "D")
    require_width("row_normalise", "D", x.shape[1])
    if not eps > 0:
        raise ValueError(f"row_normalise: eps must be > 0; got {eps}")
    chosen = choose("row_normalise", impl, x)
    if chosen == "reference":
        return reference.row_normalise(x, eps)
    return _forward(x, eps, chosen)


@torch.library.custom_op("mooring::row_normalise", mutates_args=())
def _forward(x: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        from mooring_kernels.row_normalise import gpu

        return gpu.row_normalise_fwd(x, eps)
    from mooring_kernels.row_normalise import cpu

    return cpu.row_normalise_fwd(x, eps)


@_forward.register_fake
def _(x: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.custom_op("mooring::row_normalise_backward", mutates_args=())
def _backward(
    grad_unit: Tensor, grad_norm: Tensor, unit: Tensor, norm: Tensor, eps: float, impl: str
) -> Tensor:
    if impl == "triton":
        from mooring_kernels.row_normalise import gpu

        return gpu.row_normalise_bwd(grad_unit, grad_norm, unit, norm, eps)
    from mooring_kernels.row_normalise import cpu

    return cpu.row_normalise_bwd(grad_unit, grad_norm, unit, norm, eps)


@_backward.register_fake
def _(grad_unit: Tensor, grad_norm: Tensor, unit: Tensor, norm: Tensor, eps: float, impl: str) -> Tensor:
    return unit.new_empty(unit.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float, str], output: tuple[Tensor, Tensor]) -> None:
    _, ctx.eps, ctx.impl = inputs
    ctx.save_for_backward(*output)


def _autograd(ctx: Any, grad_unit: Tensor | None, grad_norm: Tensor | None) -> tuple[Tensor, None, None]:
    unit, norm = ctx.saved_tensors
    if grad_unit is None:
        grad_unit = torch.zeros_like(unit)
    if grad_norm is None:
        grad_norm = torch.zeros_like(norm)
    return _backward(grad_unit, grad_norm, unit, norm, ctx.eps, ctx.impl), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
