"""Orthogonal Procrustes over a bank: checks and choice of the solver. No gradient passes."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from mooring_kernels.procrustes_rotation import polar, reference
from mooring_kernels.runtime.checks import require_floats, require_labels, require_one_device, require_width
from mooring_kernels.runtime.dispatch import Impl, working_dtype

Solver = Literal["auto", "polar", "svd"]
# Below it a strong drift can leave singular values under those that the polar iteration is made for.
POLAR_RIDGE = 1e-3


def procrustes_rotation(
    frozen: Tensor,
    tuned: Tensor,
    labels: Tensor,
    ridge: float = 1e-3,
    solver: Solver = "auto",
    *,
    centred: bool = True,
    det_fix: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """``R = argmin_{Q^T Q = I} sum_k |Q x_k - y_k|^2 + eps |Q - I|_F^2``, ``eps = ridge |S|_2``, ``S = X^T Y``.

    x_k and y_k are the frozen and the tuned rows with a label, less their means if ``centred``. The ridge makes R
    unique where the banks do not span all directions (fewer rows than D, dead features), and pulls it to the
    identity there. With nothing to fit (no row, one row, equal rows) R is the identity.

    Args:
        frozen, tuned: [K, D] float32 or bfloat16, computed in fp32; float64 in float64. K may be 0.
        labels: [K] int64; a row with a negative label is masked.
        ridge: rho >= 0; 1e-4 is nearly the unregularised answer, 1e-2 visibly under-rotates.
        solver: ``"polar"``: matrix products only, nothing waits for the device; needs ridge > 0 and gives no
            ``det_fix``. ``"svd"``: for any options. ``"auto"``: polar for ridge >= 1e-3 without ``det_fix``.
        centred: subtract the means (public code); the paper's eq. 7 does not.
        det_fix: force determinant +1 (public code), as the paper's eq. 7 does not.
        impl: ``"reference"`` is the SVD. The op consists of matrix products, so ``"native"`` and
            ``"triton"`` name the polar program, whose products are the device library's.

    Returns:
        R [D, D] float32 (float64 if an input is), acting on column vectors; rows: ``x @ R.T``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options do not fit.

    Source: arXiv 2308.12058, eq. 7; the ridge is this engine's. Differs from the public code: there no ridge, and
    the determinant, which underflows in fp32 at D = 2048 and then removes a direction.
    Cost: 2 K D^2 FLOP, then 84 D^3 (polar) or about 22 D^3 in long chains of small steps (svd).
    """
    op = "procrustes_rotation"
    require_floats(op, "frozen", frozen, "K", "D")
    require_floats(op, "tuned", tuned, *frozen.shape)
    require_labels(op, "labels", labels, frozen.shape[0])
    require_width(op, "D", frozen.shape[1])
    require_one_device(op, frozen=frozen, tuned=tuned, labels=labels)
    if not (ridge >= 0 and math.isfinite(ridge)):
        raise ValueError(f"{op}: ridge must be finite and >= 0; got {ridge}")
    if solver not in get_args(Solver):
        raise ValueError(f"{op}: solver must be one of {', '.join(get_args(Solver))}; got {solver!r}")
    if impl not in get_args(Impl):
        raise ValueError(f"{op}: impl must be one of {', '.join(get_args(Impl))}; got {impl!r}")
    by_products = solver == "polar" or (solver == "auto" and impl in ("native", "triton"))
    if by_products and (ridge == 0 or det_fix):
        raise ValueError(
            f"{op}: the polar solver needs ridge > 0 and det_fix=False; got ridge={ridge}, det_fix={det_fix}: "
            "use solver='svd'"
        )
    if by_products and impl == "reference":
        raise ValueError(
            f"{op}: impl='reference' is the SVD; got solver='polar': use solver='auto' or impl='auto'"
        )
    if solver == "auto" and impl == "auto":
        by_products = ridge >= POLAR_RIDGE and not det_fix
    return _forward(frozen.detach(), tuned.detach(), labels, float(ridge), by_products, centred, det_fix)


@torch.library.custom_op("mooring::procrustes_rotation", mutates_args=())
def _forward(
    frozen: Tensor,
    tuned: Tensor,
    labels: Tensor,
    ridge: float,
    by_products: bool,
    centred: bool,
    det_fix: bool,
) -> Tensor:
    # bf16 products would leave R orthogonal to two digits only
    with torch.autocast(frozen.device.type, enabled=False):
        if by_products:
            return polar.procrustes_rotation(frozen, tuned, labels, ridge, centred)
        return reference.procrustes_rotation(frozen, tuned, labels, ridge, centred, det_fix)


@_forward.register_fake
def _(
    frozen: Tensor,
    tuned: Tensor,
    labels: Tensor,
    ridge: float,
    by_products: bool,
    centred: bool,
    det_fix: bool,
) -> Tensor:
    width = frozen.shape[1]
    return frozen.new_empty(width, width, dtype=working_dtype(frozen, tuned))
