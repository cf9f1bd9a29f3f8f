"""The gate before any timing: outputs and gradients of a candidate against the definition in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.operation import Inputs, Operation, Outputs, Size, as_float64, map_tensors


class VerificationError(RuntimeError):
    """A candidate does not compute the op it is registered for."""


@dataclass(frozen=True)
class Expected:
    """Float64 outputs and gradients of one op on one set of inputs, and their upstream gradients."""

    outputs: Outputs
    gradients: Outputs
    upstream: Outputs


def seeded_inputs(
    operation: Operation, size: Size, dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    """Inputs drawn on the CPU by seed: every device gets the same numbers. Gradients are asked for."""
    drawn = operation.inputs(size, torch.Generator().manual_seed(seed), dtype)
    inputs = map_tensors(drawn, lambda tensor: tensor.to(device))
    for leaf in _leaves(operation, inputs):
        leaf.requires_grad_()
    return inputs


def _leaves(operation: Operation, inputs: Inputs) -> list[Tensor]:
    """The tensors whose gradient is taken, of inputs that are tensors and of those that are lists."""
    named = [inputs[name] for name in operation.differentiable]
    return [leaf for value in named for leaf in (value if isinstance(value, list) else [value])]


def _differentiable_outputs(outputs: Outputs) -> Outputs:
    return tuple(output for output in outputs if output.requires_grad)


def gradients(operation: Operation, inputs: Inputs, outputs: Outputs, upstream: Outputs) -> Outputs:
    """Gradients towards the differentiable inputs. The graph is kept: a timed backward runs many times.

    Raises:
        VerificationError: an output that should carry a gradient does not.
    """
    wanted = _leaves(operation, inputs)
    differentiable = _differentiable_outputs(outputs)
    if len(differentiable) != len(upstream):
        raise VerificationError(
            f"{operation.name}: expected {len(upstream)} outputs with a gradient, got {len(differentiable)}"
        )
    given = [g.to(output.device, output.dtype) for g, output in zip(upstream, differentiable, strict=True)]
    return torch.autograd.grad(differentiable, wanted, given, retain_graph=True)


def upstream_for(outputs: Outputs, seed: int) -> Outputs:
    """Random upstream gradients: a uniform one would hide indexing errors."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device, output.dtype)
        for output in _differentiable_outputs(outputs)
    )


def expected_of(operation: Operation, inputs: Inputs, seed: int) -> Expected:
    """Runs the definition in float64 on the CPU, where its every step has float64 kernels."""
    exact = as_float64(map_tensors(inputs, lambda tensor: tensor.detach().cpu()))
    for leaf in _leaves(operation, exact):
        leaf.requires_grad_()
    outputs = operation.candidates[0].call(exact)
    if not operation.differentiable:
        return Expected(outputs, (), ())
    upstream = upstream_for(outputs, seed)
    return Expected(outputs, gradients(operation, exact, outputs, upstream), upstream)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` in the Euclidean norm; NaN stays NaN."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def bound_for(operation: Operation, size: Size, result: Tensor, dtype: torch.dtype) -> float:
    """Largest relative error that rounding explains.

    fp32 sums of n terms in any order are off by about sqrt(n) 2^-24 relative to their largest terms; 16
    leaves room for what follows the sum. A result stored in less than fp32 rounds once more, and a gradient
    of inputs in less than fp32 is formed from outputs that were rounded so.
    """
    longest_sum = operation.longest_sum(size)
    summed = 16.0 * operation.amplification * longest_sum**0.5 * 2.0**-24
    coarse = result.dtype if result.is_floating_point() else torch.float32
    stored = torch.finfo(coarse).eps
    graded = 2.0 * torch.finfo(dtype).eps if operation.differentiable else 0.0
    return summed + stored + graded


def verify(
    operation: Operation,
    call_outputs: Outputs,
    call_gradients: Outputs,
    expected: Expected,
    size: Size,
    dtype: torch.dtype,
    candidate: str,
) -> float:
    """Largest relative error of all outputs and gradients.

    Raises:
        VerificationError: an error is NaN or over its bound, or a result is missing.
    """
    results, exact = (*call_outputs, *call_gradients), (*expected.outputs, *expected.gradients)
    if len(results) != len(exact):
        raise VerificationError(
            f"{operation.name}/{candidate}: expected {len(exact)} results, got {len(results)}"
        )
    worst = 0.0
    for number, (result, reference) in enumerate(zip(results, exact, strict=True)):
        error = relative_error(result, reference)
        bound = bound_for(operation, size, result, dtype)
        if not error <= bound:
            raise VerificationError(
                f"{operation.name}/{candidate} {size} {dtype}: result {number} is off by {error:.3g}, "
                f"rounding explains {bound:.3g}"
            )
        worst = max(worst, error)
    return worst
