"""Class means of a bank: checks and dispatch. No gradient passes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mooring_kernels.class_statistics import reference
from mooring_kernels.runtime.checks import require_floats, require_labels, require_one_device, require_width
from mooring_kernels.runtime.dispatch import Impl, choose


def require_bank(op: str, frozen: Tensor, tuned: Tensor, labels: Tensor, head_weight: Tensor) -> None:
    """The arguments that the ops on a pair of banks share.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    require_floats(op, "frozen", frozen, "K", "D")
    require_floats(op, "tuned", tuned, *frozen.shape)
    require_labels(op, "labels", labels, frozen.shape[0])
    require_floats(op, "head_weight", head_weight, "C", frozen.shape[1])
    require_width(op, "D", frozen.shape[1])
    require_width(op, "C", head_weight.shape[0])
    require_one_device(op, frozen=frozen, tuned=tuned, labels=labels, head_weight=head_weight)


def require_cga_scale(op: str, cga_scale: float) -> None:
    """A sharpness that is finite and not negative.

    Raises:
        ValueError: it is not.
    """
    if not (cga_scale >= 0 and math.isfinite(cga_scale)):
        raise ValueError(f"{op}: cga_scale must be finite and >= 0; got {cga_scale}")


def class_statistics(
    frozen: Tensor,
    tuned: Tensor,
    labels: Tensor,
    head_weight: Tensor,
    cga_scale: float = 1.0,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain frozen and confidence-weighted tuned mean of every class in a bank.

    ``m_c = (1 / n_c) sum_{l_k = c} p_k``, ``mu_c = sum_{l_k = c} w_k d_k`` with ``w = softmax`` over the members
    of c of ``cga_scale * d_k . W_c / |W_c|``. The largest exponent of each class is subtracted first, so any
    ``cga_scale`` is stable. The result does not depend on the number of threads.

    Args:
        frozen: p, [K, D] float32 or bfloat16 (float16, float64: reference); K may be 0.
        tuned: d, [K, D].
        labels: l, [K] int64; a row whose label is outside 0..C-1 is masked and not read.
        head_weight: W, [C, D]. Detached here.
        cga_scale: sharpness of the confidence weights, >= 0; 1 is the public code's, 0 gives the plain mean.
        impl: see ``mooring_kernels``.

    Returns:
        frozen_mean [C, D], tuned_mean [C, D], count [C], float32 (float64 if an input is); zero where n_c = 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or ``cga_scale`` do not fit.

    Source: arXiv 2308.12058, eq. 8-10; cosine in place of the dot product as in the public code.
    Cost: reads K D elements of each bank (Triton: of ``tuned`` twice), writes 2 C D; about 6 K D FLOP.
    """
    require_bank("class_statistics", frozen, tuned, labels, head_weight)
    require_cga_scale("class_statistics", cga_scale)
    frozen, tuned, head_weight = frozen.detach(), tuned.detach(), head_weight.detach()
    chosen = choose("class_statistics", impl, frozen, tuned, head_weight)
    if chosen == "reference":
        return reference.class_statistics(frozen, tuned, labels, head_weight, cga_scale)
    return class_statistics_forward(frozen, tuned, labels, head_weight, cga_scale, chosen)


@torch.library.custom_op("mooring::class_statistics", mutates_args=())
def class_statistics_forward(
    frozen: Tensor, tuned: Tensor, labels: Tensor, head_weight: Tensor, cga_scale: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "triton":
        from mooring_kernels.class_statistics import gpu

        return gpu.class_statistics_fwd(frozen, tuned, labels, head_weight, cga_scale)
    from mooring_kernels.class_statistics import cpu

    return cpu.class_statistics_fwd(frozen, tuned, labels, head_weight, cga_scale)


@class_statistics_forward.register_fake
def _(
    frozen: Tensor, tuned: Tensor, labels: Tensor, head_weight: Tensor, cga_scale: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    mean = head_weight.new_empty(head_weight.shape, dtype=torch.float32)
    return mean, torch.empty_like(mean), mean.new_empty(mean.shape[:1])
