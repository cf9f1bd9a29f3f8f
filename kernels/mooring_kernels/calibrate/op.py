"""Moving frozen rows onto the tuned classes: checks and dispatch. No gradient passes."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels.calibrate import reference
from mooring_kernels.class_statistics import reference as class_statistics_reference
from mooring_kernels.class_statistics.op import class_statistics_forward, require_bank, require_cga_scale
from mooring_kernels.runtime.checks import require_floats, require_one_device
from mooring_kernels.runtime.dispatch import Chosen, Impl, choose, working_dtype


def calibrate(
    frozen: Tensor,
    tuned: Tensor,
    labels: Tensor,
    head_weight: Tensor,
    rotation: Tensor | None,
    scale: Tensor | float,
    cga_scale: float = 1.0,
    *,
    translation: bool = True,
    impl: Impl = "auto",
) -> Tensor:
    """``s * u(R (p_k - m_{l_k}) + mu_{l_k})``: each frozen row, placed where the tuned rows of its class lie.

    ``u(v) = v / max(|v|, 1e-12)``; m and mu are the class means of ``class_statistics``. A class of one row gives
    exactly its tuned row, at length s.

    Ablations: ``translation=False`` moves with one pair of means for all classes, the plain means of all valid
    rows (rotation only: a rigid motion). With ``rotation=None`` as well nothing moves: ``s * u(p_k)``.

    Args:
        frozen: p, [K, D] float32 or bfloat16 (float16, float64: reference), unit rows as a bank stores
            them; K may be 0.
        tuned: d, [K, D] unit rows.
        labels: l, [K] int64; a row whose label is outside 0..C-1 is masked: zero in the result.
        head_weight: W, [C, D]. Detached here.
        rotation: R, [D, D], acts on column vectors; None is the identity.
        scale: s, the length of the result's rows; a 0-d tensor on the same device, or a number.
        cga_scale: see ``class_statistics``.
        translation: False: the ablation above.
        impl: see ``mooring_kernels``.

    Returns:
        [K, D] float32 (float64 if an input is).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or ``cga_scale`` do not fit.

    Source: arXiv 2308.12058, eq. 8-12, in the public code's normalised form; differs from the public code for
    classes of one row, which it moves onto the all-ones direction.
    Cost: class_statistics, then reads K D elements and writes K D (three times that, and 2 K D^2 FLOP, with R).
    """
    op = "calibrate"
    require_bank(op, frozen, tuned, labels, head_weight)
    require_cga_scale(op, cga_scale)
    width = frozen.shape[1]
    if rotation is not None:
        require_floats(op, "rotation", rotation, width, width)
        rotation = rotation.detach()
    frozen, tuned, head_weight = frozen.detach(), tuned.detach(), head_weight.detach()
    inputs = (frozen, tuned, head_weight) if rotation is None else (frozen, tuned, head_weight, rotation)
    if isinstance(scale, Tensor):
        require_floats(op, "scale", scale)
        scale = scale.detach()
    else:
        scale = torch.full((), scale, dtype=working_dtype(*inputs), device=frozen.device)
    require_one_device(op, frozen=frozen, rotation=rotation, scale=scale)
    chosen = choose(op, impl, *inputs)

    if translation or rotation is not None:
        if not translation:
            # One class of all valid rows, and a prototype of zero: every confidence weight is equal.
            labels = torch.where((labels >= 0) & (labels < head_weight.shape[0]), 0, -1)
            head_weight = torch.zeros_like(head_weight[:1])
        frozen_mean, tuned_mean = _class_means(frozen, tuned, labels, head_weight, cga_scale, chosen)
    else:
        frozen_mean = tuned_mean = torch.zeros_like(head_weight, dtype=working_dtype(*inputs))
    if chosen == "reference":
        return reference.calibrate(frozen, labels, frozen_mean, tuned_mean, rotation, scale)
    return _forward(frozen, tuned, labels, frozen_mean, tuned_mean, rotation, scale, chosen)


def _class_means(
    frozen: Tensor, tuned: Tensor, labels: Tensor, head_weight: Tensor, cga_scale: float, chosen: Chosen
) -> tuple[Tensor, Tensor]:
    if chosen == "reference":
        return class_statistics_reference.class_statistics(frozen, tuned, labels, head_weight, cga_scale)[:2]
    frozen_mean, tuned_mean, _ = class_statistics_forward(
        frozen, tuned, labels, head_weight, cga_scale, chosen
    )
    return frozen_mean, tuned_mean


@torch.library.custom_op("mooring::calibrate", mutates_args=())
def _forward(
    frozen: Tensor,
    tuned: Tensor,
    labels: Tensor,
    frozen_mean: Tensor,
    tuned_mean: Tensor,
    rotation: Tensor | None,
    scale: Tensor,
    impl: str,
) -> Tensor:
    if impl == "triton":
        from mooring_kernels.calibrate import gpu

        return gpu.calibrate_fwd(frozen, tuned, labels, frozen_mean, tuned_mean, rotation, scale)
    from mooring_kernels.calibrate import cpu

    return cpu.calibrate_fwd(frozen, labels, frozen_mean, tuned_mean, rotation, scale)


@_forward.register_fake
def _(
    frozen: Tensor,
    tuned: Tensor,
    labels: Tensor,
    frozen_mean: Tensor,
    tuned_mean: Tensor,
    rotation: Tensor | None,
    scale: Tensor,
    impl: str,
) -> Tensor:
    return frozen.new_empty(frozen.shape, dtype=torch.float32)
