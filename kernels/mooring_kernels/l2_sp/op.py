"""Penalty on the distance to the starting point: checks, dispatch and autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mooring_kernels.l2_sp import multi_tensor, reference
from mooring_kernels.runtime.checks import require_one_device
from mooring_kernels.runtime.dispatch import Impl, choose


def l2_sp(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor | None],
    weight: float,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """``weight / 2 * sum_i |p_i - p0_i|^2``, with the gradient ``weight (p_i - p0_i)``.

    Sums run in fp32 over blocks of 16384 values and in float64 over the blocks, always in the same order: the
    result is the same on any number of threads.

    Args:
        parameters: p, any shapes, float32 or bfloat16 (float16, float64: reference); each keeps its own dtype,
            and its gradient has it.
        anchors: p0, one per parameter and of its shape, on its device, detached here; None stands for zeros
            (the head's beta term).
        weight: alpha or beta of the method, finite and >= 0.
        impl: ``"native"`` reads p and p0 once and writes nothing. ``"triton"`` names torch's multi-tensor
            operations, which write the differences once.

    Returns:
        0-d float32 (float64 if an input is); 0 for an empty list. It can be differentiated once.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes, devices or ``weight`` do not fit, with the index in the list.

    Source: arXiv 1802.01483, eq. 3; alpha = beta = 0.01 in the public benchmarks.
    Cost: forward reads p and p0, 3 FLOP per value; backward reads both and writes the gradient.
    """
    op = "l2_sp"
    if len(parameters) != len(anchors):
        raise ValueError(
            f"{op}: parameters and anchors must be equally many; got {len(parameters)} and {len(anchors)}"
        )
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"{op}: weight must be finite and >= 0; got {weight}")
    for number, (parameter, anchor) in enumerate(zip(parameters, anchors, strict=True)):
        named = {f"parameters[{number}]": parameter, f"anchors[{number}]": anchor}
        for name, tensor in named.items():
            if tensor is not None and not tensor.is_floating_point():
                raise TypeError(f"{op}: {name} must be float32 or bfloat16; got {tensor.dtype}")
        if anchor is not None and anchor.shape != parameter.shape:
            raise ValueError(
                f"{op}: anchors[{number}] must be {list(parameter.shape)} as its parameter; "
                f"got {list(anchor.shape)}"
            )
        if parameter.device != parameters[0].device or (
            anchor is not None and anchor.device != parameter.device
        ):
            require_one_device(op, **{"parameters[0]": parameters[0], **named})
    if not parameters:
        return torch.zeros(())
    anchored = [anchor is not None for anchor in anchors]
    present = [anchor.detach() for anchor in anchors if anchor is not None]
    chosen = choose(op, impl, *parameters, *present)
    if chosen == "reference":
        with torch.autocast(parameters[0].device.type, enabled=False):
            return reference.l2_sp(parameters, [None if a is None else a.detach() for a in anchors], weight)
    return _forward(list(parameters), present, anchored, float(weight), chosen)


def _spread(anchors: Sequence[Tensor], anchored: Sequence[bool]) -> list[Tensor | None]:
    """Undoes the packing: operators take lists of tensors, not of tensors or None."""
    packed = iter(anchors)
    return [next(packed) if present else None for present in anchored]


@torch.library.custom_op("mooring::l2_sp", mutates_args=())
def _forward(
    parameters: list[Tensor], anchors: list[Tensor], anchored: list[bool], weight: float, impl: str
) -> Tensor:
    full = _spread(anchors, anchored)
    if impl == "native":
        from mooring_kernels.l2_sp import cpu

        return torch.tensor(0.5 * weight * cpu.squared_distance(parameters, full), dtype=torch.float32)
    return 0.5 * weight * multi_tensor.squared_distance(parameters, full)


@_forward.register_fake
def _(
    parameters: list[Tensor], anchors: list[Tensor], anchored: list[bool], weight: float, impl: str
) -> Tensor:
    return parameters[0].new_empty((), dtype=torch.float32)


@torch.library.custom_op("mooring::l2_sp_backward", mutates_args=())
def _backward(
    parameters: list[Tensor], anchors: list[Tensor], anchored: list[bool], scale: Tensor, impl: str
) -> list[Tensor]:
    full = _spread(anchors, anchored)
    if impl == "native":
        from mooring_kernels.l2_sp import cpu

        return cpu.scaled_drift(parameters, full, float(scale))
    return multi_tensor.scaled_drift(parameters, full, scale)


@_backward.register_fake
def _(
    parameters: list[Tensor], anchors: list[Tensor], anchored: list[bool], scale: Tensor, impl: str
) -> list[Tensor]:
    return [torch.empty_like(parameter) for parameter in parameters]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    parameters, anchors, ctx.anchored, ctx.weight, ctx.impl = inputs
    ctx.count = len(parameters)
    ctx.save_for_backward(*parameters, *anchors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    parameters = ctx.saved_tensors[: ctx.count]
    full = _spread(ctx.saved_tensors[ctx.count :], ctx.anchored)
    wanted = [number for number, needed in enumerate(ctx.needs_input_grad[0]) if needed]
    anchored = [full[number] is not None for number in wanted]
    grads = _backward(
        [parameters[number] for number in wanted],
        [anchor for anchor in (full[number] for number in wanted) if anchor is not None],
        anchored,
        ctx.weight * grad,
        ctx.impl,
    )
    result: list[Tensor | None] = [None] * ctx.count
    for number, value in zip(wanted, grads, strict=True):
        result[number] = value
    return result, [None] * (len(ctx.saved_tensors) - ctx.count), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
