"""Orthogonal Procrustes over a bank: checks and choice of the solver. No gradient passes."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from mooring_kernels.procrustes_rotation import newton, polynomial, reference
from mooring_kernels.runtime.checks import require_floats, require_labels, require_one_device, require_width
from mooring_kernels.runtime.dispatch import Impl, working_dtype

Solver = Literal["auto", "newton", "polar", "svd"]
# Below this width LAPACK's SVD is over before the blocked inverses have begun (two threads or one).
NEWTON_WIDTH = 192


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
        solver: ``"polar"``: matrix products only, nothing waits for the device. ``"newton"``: inverses and
            Zolotarev's rational function; CPU only. Both need ridge > 0 and give no ``det_fix``.
            ``"svd"``: for any options. ``"auto"``: polar on a GPU; newton on a CPU for D >= 192, svd below;
            svd for ridge 0, ``det_fix`` and float64.
        centred: subtract the means (public code); the paper's eq. 7 does not.
        det_fix: force determinant +1 (public code), as the paper's eq. 7 does not.
        impl: ``"reference"`` is the SVD. The op consists of matrix products, so ``"native"`` names newton (polar
            for tensors of a GPU) and ``"triton"`` polar, whose products are the device library's.

    Returns:
        R [D, D] float32 (float64 if an input is), acting on column vectors; rows: ``x @ R.T``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options do not fit.

    Source: arXiv 2308.12058, eq. 7; the ridge is this engine's. Differs from the public code: there no ridge, and
    the determinant, which underflows in fp32 at D = 2048 and then removes a direction.
    Error: S has errors of some 1e-7 |S|; a direction of M = S^T + eps I with singular value s |S| turns by 1e-7 / s
    whatever the solver, and s is rho or, under strong drift, less. |R^T R - I| <= 1e-5 whatever M.
    Cost: 2 K D^2 FLOP, then 84 D^3 at ridge 1e-3, 6 D^3 more or less for each factor of 4.1 in the ridge (polar);
    2.5 D^3 per Newton step, 1.3 D^3 per pole and 3 D^3: 9 D^3 for a condition number of 20, 15 D^3 for 2e5
    (newton); about 22 D^3 for the SVD, and 12 D^3 more for the exact norm (svd). Up to D / 3 rows: newton works
    in the span of the rows, its D^3 are (2 K)^3.
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
    chosen = _choose(solver, impl, frozen, working_dtype(frozen, tuned), ridge > 0 and not det_fix)
    if chosen != "svd" and (ridge == 0 or det_fix):
        raise ValueError(
            f"{op}: the {chosen} solver needs ridge > 0 and det_fix=False; got ridge={ridge}, det_fix={det_fix}: "
            "use solver='svd'"
        )
    if chosen != "svd" and impl == "reference":
        raise ValueError(
            f"{op}: impl='reference' is the SVD; got solver={solver!r}: use solver='auto' or impl='auto'"
        )
    if chosen == "newton" and frozen.device.type != "cpu":
        raise ValueError(
            f"{op}: the newton solver is for CPU tensors; got {frozen.device}: use solver='polar'"
        )
    return _forward(frozen.detach(), tuned.detach(), labels, float(ridge), chosen, centred, det_fix)


def _choose(solver: Solver, impl: Impl, frozen: Tensor, dtype: torch.dtype, has_polar_form: bool) -> str:
    if solver != "auto":
        return solver
    on_cpu = frozen.device.type == "cpu"
    if impl == "reference":
        return "svd"
    if impl != "auto":
        return "newton" if impl == "native" and on_cpu else "polar"
    if not has_polar_form or dtype == torch.float64:
        return "svd"
    if on_cpu:
        return "newton" if frozen.shape[1] >= NEWTON_WIDTH else "svd"
    return "polar"


@torch.library.custom_op("mooring::procrustes_rotation", mutates_args=())
def _forward(
    frozen: Tensor,
    tuned: Tensor,
    labels: Tensor,
    ridge: float,
    solver: str,
    centred: bool,
    det_fix: bool,
) -> Tensor:
    # bf16 products would leave R orthogonal to two digits only
    with torch.autocast(frozen.device.type, enabled=False):
        if solver == "newton":
            return newton.procrustes_rotation(frozen, tuned, labels, ridge, centred)
        if solver == "polar":
            return polynomial.procrustes_rotation(frozen, tuned, labels, ridge, centred)
        return reference.procrustes_rotation(frozen, tuned, labels, ridge, centred, det_fix)


@_forward.register_fake
def _(
    frozen: Tensor,
    tuned: Tensor,
    labels: Tensor,
    ridge: float,
    solver: str,
    centred: bool,
    det_fix: bool,
) -> Tensor:
    width = frozen.shape[1]
    return frozen.new_empty(width, width, dtype=working_dtype(frozen, tuned))
