"""BatchNorm with the statistics of its batch: checks and dispatch. No gradient passes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mooring_kernels.batchnorm_statistics import reference
from mooring_kernels.batchnorm_statistics.layout import laid_out
from mooring_kernels.runtime.checks import require_floats, require_one_device, require_width
from mooring_kernels.runtime.dispatch import Impl, choose, working_dtype

_OP = "batchnorm_statistics"
# Elements under which, on a CPU, torch's own three operations cost less than the call of a custom op: measured
# 0.81 to 0.95 of the native time at 256 to 1,024 elements, 1.4 times it at 4,096.
_FEWEST_FOR_NATIVE = 2048


def batchnorm_statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Output of BatchNorm in eval mode, and the mean and variance that train mode would have used, in one pass.

    ``y = (x - mu) weight / sqrt(v + eps) + bias`` with the running mean mu and variance v. Per channel, over the
    n = B * positions values x_i, with ``S1 = sum (x_i - mu)`` and ``S2 = sum (x_i - mu)^2``:
    ``batch_mean = mu + S1 / n``, ``batch_var = (S2 - S1^2 / n) / (n - 1)``. For n = 1 the unbiased variance is
    undefined; 0, the biased one, is returned.

    Sums: at most 4096 values are summed in fp32 (over several lanes), the partial sums in float64, in an order
    that depends on the shape only: neither on the number of threads nor on the run. With the unit roundoff
    u = 2^-24 and m terms per lane, batch_mean is off by at most about ``m u mean|x - mu|``, batch_var by
    ``m u (v_b + (batch_mean - mu)^2)``: the running mean is the shift, and a channel whose batch mean lies k
    standard deviations off it loses a factor 1 + k^2 of accuracy.

    Args:
        x: [B, C, *spatial] or [B, C], float32 or bfloat16 (float16, float64: reference); B * positions >= 1.
            Contiguous and channels_last are both read as they lie; anything else is copied first.
        running_mean: mu, [C].
        running_var: v, [C], >= 0.
        weight: gamma, [C]; None: 1.
        bias: beta, [C]; None: 0.
        eps: of the layer, > 0.
        impl: see ``mooring_kernels``.

    Returns:
        y like x, as it lies (the reference leaves the layout to torch); batch_mean [C], batch_var [C] float32
        (float64 for float64 x).

    Raises:
        ValueError: a gradient would have to pass (grad mode is on and an input requires one): this is a pass
            under ``torch.no_grad()``; or shapes, devices, ``eps`` do not fit.
        TypeError: a dtype does not fit.

    Source: arXiv 2308.07728 (DAFT). Differs from the public code, which copies x to be contiguous and reads it
    three times: for the mean, the variance and the normalisation.
    Cost: reads and writes n C elements once; 6 n C FLOP.
    """
    require_floats(_OP, "x", x, "B", "C", *"P" * max(x.dim() - 2, 0))
    channels = x.shape[1]
    require_width(_OP, "the number of values per channel", x.numel() // channels if channels else 0)
    given = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    present = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in present.items():
        require_floats(_OP, name, tensor, channels)
    require_one_device(_OP, x=x, **present)
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"{_OP}: eps must be > 0; got {eps}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *present.values())):
        raise ValueError(f"{_OP}: no gradient is defined; call it under torch.no_grad()")
    chosen = choose(_OP, impl, x)
    if impl == "auto" and chosen == "native" and x.numel() < _FEWEST_FOR_NATIVE:
        chosen = "reference"
    if chosen == "reference":
        return reference.batchnorm_statistics(x, running_mean, running_var, weight, bias, eps)
    return _forward(x, running_mean, running_var, weight, bias, eps, chosen)


@torch.library.custom_op("mooring::batchnorm_statistics", mutates_args=())
def _forward(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "triton":
        from mooring_kernels.batchnorm_statistics import gpu

        return gpu.batchnorm_statistics_fwd(x, running_mean, running_var, weight, bias, eps)
    from mooring_kernels.batchnorm_statistics import cpu

    return cpu.batchnorm_statistics_fwd(x, running_mean, running_var, weight, bias, eps)


@_forward.register_fake
def _(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=working_dtype(x))
    return torch.empty_like(laid_out(x)), mean, torch.empty_like(mean)
