"""Conversion of BatchNorm layers to other statistics: checks, registration. No gradient passes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mooring_kernels.convert_batchnorm import reference
from mooring_kernels.runtime.checks import require_floats, require_one_device

_OP = "convert_batchnorm_"
_EXACT = (torch.float32, torch.float64)


def convert_batchnorm_(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    target_means: Sequence[Tensor],
    target_vars: Sequence[Tensor],
    eps: Sequence[float],
    *,
    max_ratio: float = math.inf,
) -> list[Tensor]:
    """Gives BatchNorm layers other running statistics and takes the change out of weight and bias, in place.

    Per layer, with the statistics (mu, v) it has and (mu_T, v_T) it gets:
    ``weight <- weight sqrt(v_T + eps) / sqrt(v + eps)``,
    ``bias <- bias + (mu_T - mu) weight / sqrt(v + eps)`` with the weight from before,
    ``running_mean <- mu_T``, ``running_var <- v_T``. The function of the layer in eval mode stays the same for any
    mu_T and any v_T >= 0, v_T = 0 included. Arithmetic is float64, from mu_T and v_T as the buffers will hold
    them; only the stores round. Without ``max_ratio`` a second call with the same targets changes nothing; with it, a
    second call goes on from where the first stopped.

    All checks come before the first write. There is one implementation, torch operations on one vector of all
    channels: the work is too small for a kernel.

    Args:
        weights, biases: gamma and beta, one [C_l] float32 or float64 tensor per layer; written in place.
        running_means, running_vars: mu and v, [C_l], the same dtypes; written in place.
        target_means, target_vars: mu_T and v_T, [C_l] of any float dtype, v_T >= 0. Their values are not checked:
            that would wait for the device.
        eps: of each layer, > 0.
        max_ratio: v_T is first moved so far that no weight changes by more than this factor, up or down, >= 1.
            It is v_T that is clamped, not the weight, so that the function still stays the same.

    Returns:
        Per layer the factor of its weights, sqrt(v_T + eps) / sqrt(v + eps), [C_l] float64. One that is far from 1
        marks a channel that was all but constant on one of the two data sets.

    Raises:
        ValueError: lists of different lengths, shapes, devices, ``eps`` or ``max_ratio`` do not fit, or two layers
            share a tensor: no one value of it suits both.
        TypeError: a weight, bias or buffer is bfloat16 or float16: a store rounds by 2^-9, and the function would
            change. Keep BatchNorm parameters in float32.

    Source: arXiv 2308.07728 (DAFT). Differs from the public code: float64, the rounding of the buffers included.
    Cost: 10 sum(C_l) values read or written; 12 sum(C_l) FLOP.
    """
    own = {
        "weights": list(weights),
        "biases": list(biases),
        "running_means": list(running_means),
        "running_vars": list(running_vars),
    }
    targets = {"target_means": list(target_means), "target_vars": list(target_vars)}
    lengths = {name: len(tensors) for name, tensors in (own | targets).items()} | {"eps": len(eps)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{_OP}: all lists must be equally long, one entry per layer; got {lengths}")
    if not max_ratio >= 1:
        raise ValueError(f"{_OP}: max_ratio must be >= 1; got {max_ratio}")
    for layer, value in enumerate(eps):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{_OP}: eps[{layer}] must be > 0; got {value}")
    for name, tensors in (own | targets).items():
        for layer, tensor in enumerate(tensors):
            require_floats(
                _OP,
                f"{name}[{layer}]",
                tensor,
                own["weights"][layer].shape[0] if layer or name != "weights" else "C",
            )
            require_one_device(_OP, **{"weights[0]": own["weights"][0], f"{name}[{layer}]": tensor})
            if name in own and tensor.dtype not in _EXACT:
                raise TypeError(
                    f"{_OP}: {name}[{layer}] must be float32 or float64; got "
                    f"{str(tensor.dtype).removeprefix('torch.')}, whose rounding would change the layer's function: "
                    "keep BatchNorm parameters and buffers in float32"
                )
    written = [tensor for tensors in own.values() for tensor in tensors]
    if len({id(tensor) for tensor in written}) < len(written):
        raise ValueError(f"{_OP}: every layer needs tensors of its own; got one tensor in two places")
    if not written:
        return []
    with torch.no_grad():  # parameters are leaves that require a gradient; none passes through here
        ratios = _convert(*own.values(), *targets.values(), [float(e) for e in eps], float(max_ratio))
    return list(ratios.split([weight.shape[0] for weight in own["weights"]]))


@torch.library.custom_op(
    "mooring::convert_batchnorm", mutates_args=("weights", "biases", "running_means", "running_vars")
)
def _convert(
    weights: list[Tensor],
    biases: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    target_means: list[Tensor],
    target_vars: list[Tensor],
    eps: list[float],
    max_ratio: float,
) -> Tensor:
    return reference.convert_batchnorm(
        weights, biases, running_means, running_vars, target_means, target_vars, eps, max_ratio
    )


@_convert.register_fake
def _(
    weights: list[Tensor],
    biases: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    target_means: list[Tensor],
    target_vars: list[Tensor],
    eps: list[float],
    max_ratio: float,
) -> Tensor:
    return weights[0].new_empty(sum(weight.shape[0] for weight in weights), dtype=torch.float64)
