"""procrustes_rotation: its solvers against a float64 SVD, and the degenerate banks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from implementations import draw_unit_rows
from torch import Tensor

from mooring_kernels import procrustes_rotation
from mooring_kernels.procrustes_rotation import blocks, covariance, newton, polynomial, zolotarev

SOLVERS = ["newton", "polar", "svd"]


def drifted_bank(
    rows: int, width: int, drift: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows with a decaying spectrum, as features have; tuned ones rotated by `drift` and perturbed."""
    scales = torch.arange(1, width + 1).pow(-0.5)
    frozen = (torch.randn(rows, width, generator=generator) * scales).relu()
    square = torch.randn(width, width, generator=generator) / width**0.5
    turn = torch.matrix_exp(drift * (square - square.T))
    tuned = frozen @ turn.T + 0.02 * torch.randn(rows, width, generator=generator)
    labels = torch.zeros(rows, dtype=torch.int64)
    return torch.nn.functional.normalize(frozen), torch.nn.functional.normalize(tuned), labels


def exact(frozen: Tensor, tuned: Tensor, labels: Tensor, ridge: float, centred: bool = True) -> Tensor:
    x, y = frozen[labels >= 0].double(), tuned[labels >= 0].double()
    if centred:
        x, y = x - x.mean(0), y - y.mean(0)
    covariance = x.T @ y
    eps = ridge * torch.linalg.svdvals(covariance)[0]
    left, _, right = torch.linalg.svd(covariance.T + eps * torch.eye(x.shape[1], dtype=torch.float64))
    return left @ right


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("ridge", [1e-2, 1e-3])
@pytest.mark.parametrize(
    "rows,drift",
    [(200, 0.2), (200, 1.0), (64, 3.0), (40, 0.2), (20, 1.0)],
    ids=["small", "large", "n=D", "n<D", "n<D/3"],
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_match_a_float64_svd(
    solver: Any, rows: int, drift: float, ridge: float, centred: bool, generator: torch.Generator
) -> None:
    frozen, tuned, labels = drifted_bank(rows, 64, drift, generator)
    got = procrustes_rotation(frozen, tuned, labels, ridge, solver, centred=centred)
    expected = exact(frozen, tuned, labels, ridge, centred)
    torch.testing.assert_close(got.T @ got, torch.eye(64), rtol=0, atol=1e-5)
    # An entry of S is off by ~1e-7 |S|, a direction with singular value s |S| by 1e-7 / s, and s >= ridge / 3 or so.
    rotated, exact_rows = (frozen.double() @ r.double().T for r in (got, expected))
    assert (rotated - exact_rows).norm(dim=1).max() < 3e-7 / ridge


@pytest.mark.parametrize("ridge", [1e-4, 1e-6])
@pytest.mark.parametrize("rows,drift", [(200, 1.0), (48, 3.0), (30, 1.0)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_low_ridge_leaves_the_rotation_orthogonal(
    solver: Any, rows: int, drift: float, ridge: float, generator: torch.Generator
) -> None:
    """Singular values under the ridge's, down to fp32 noise: directions are lost there, orthogonality is not."""
    bank = drifted_bank(rows, 64, drift, generator)
    got = procrustes_rotation(*bank, ridge, solver)
    torch.testing.assert_close(got.T @ got, torch.eye(64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [900, 150], ids=["full", "span"])
def test_blocks_wider_than_a_leaf(rows: int, generator: torch.Generator) -> None:
    """D = 531 takes each blocked path of the inverses, with uneven blocks; twice the same bank, the same bits."""
    frozen = torch.nn.functional.normalize(torch.randn(rows, 531, generator=generator))
    noise = torch.randn(rows, 531, generator=generator)
    tuned = torch.nn.functional.normalize(frozen.roll(1, 1) + 0.02 * noise)
    labels = torch.zeros(rows, dtype=torch.int64)
    got = procrustes_rotation(frozen, tuned, labels)
    assert torch.equal(got, procrustes_rotation(frozen, tuned, labels))
    assert torch.equal(got, procrustes_rotation(frozen, tuned, labels, solver="newton"))
    expected = exact(frozen, tuned, labels, 1e-3)
    rotated, exact_rows = (frozen.double() @ r.double().T for r in (got, expected))
    assert (rotated - exact_rows).norm(dim=1).max() < 1e-4
    torch.testing.assert_close(got.T @ got, torch.eye(531), rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_after_warm_up_the_rotation_is_the_identity(solver: Any, generator: torch.Generator) -> None:
    """Both banks hold the frozen features: also with fewer rows than dimensions, and dead dimensions."""
    for rows, width in ((48, 96), (20, 96), (60, 200)):
        frozen, _, labels = drifted_bank(rows, width, 0.0, generator)
        frozen[:, 70:80] = 0
        got = procrustes_rotation(frozen, frozen, labels, solver=solver)
        # the spec's 1e-5; the SVD in fp32 loses 1e-7 / ridge in the directions that only the ridge fixes
        torch.testing.assert_close(got, torch.eye(width), rtol=0, atol=1e-4 if solver == "svd" else 1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("rows", [0, 1, 3], ids=["n0", "n1", "n3-equal"])
def test_nothing_to_fit_gives_the_identity(rows: int, solver: Any, generator: torch.Generator) -> None:
    frozen, tuned = (draw_unit_rows(1, 33, generator).expand(5, 33).clone() for _ in range(2))
    labels = torch.full((5,), -1)
    labels[:rows] = 2
    frozen[rows:] = torch.nan  # an empty slot is not read
    got = procrustes_rotation(frozen, tuned, labels, solver=solver)
    torch.testing.assert_close(got, torch.eye(33), rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_masked_rows_and_row_order_do_not_matter(solver: Any, generator: torch.Generator) -> None:
    frozen, tuned, labels = drifted_bank(60, 24, 0.3, generator)
    expected = procrustes_rotation(frozen, tuned, labels, solver=solver)
    order = torch.randperm(70, generator=generator)
    padding = torch.full((10, 24), torch.inf)
    got = procrustes_rotation(
        torch.cat([frozen, padding])[order],
        torch.cat([tuned, padding])[order],
        torch.cat([labels, torch.full((10,), -1)])[order],
        solver=solver,
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", [48, 300])
def test_polar_factors_over_the_whole_range_of_singular_values(
    width: int, generator: torch.Generator
) -> None:
    """Down to 5e-7 of the largest, where the spectrum's top is one value or many (the bound's worst case)."""
    left, right = (
        torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0] for _ in "ab"
    )
    for values in (
        torch.logspace(0, -6.3, width),
        torch.logspace(0, -3, width),
        torch.ones(width),
        torch.cat([torch.ones(1), torch.full((width - 1,), 5e-7)]),
        torch.cat([torch.ones(width - 1), torch.full((1,), 5e-7)]),
    ):
        matrix = left @ torch.diag(values.double()) @ right
        for factor in (
            lambda m, scale: newton.polar_factor(m, scale),
            lambda m, scale: polynomial.polar_factor(m),
        ):
            for scale in (0.1, 100.0):
                wide = factor(scale * matrix, scale)
                torch.testing.assert_close(wide, left @ right, rtol=0, atol=1e-8)
                narrow = factor((scale * matrix).float(), scale)
                torch.testing.assert_close(narrow.T @ narrow, torch.eye(width), rtol=0, atol=1e-5)


def test_newton_survives_a_wrong_norm_and_a_singular_matrix(generator: torch.Generator) -> None:
    """The look at ``R^T R`` catches what estimates missed; a pivot of zero becomes rounding error."""
    matrix = torch.randn(40, 40, generator=generator)
    torch.testing.assert_close(
        newton.polar_factor(matrix, 0.02), newton.polar_factor(matrix, 10.0), rtol=0, atol=1e-4
    )
    matrix[:, 7] = 0
    assert newton.polar_factor(matrix * torch.inf, 12.0).isnan().all()
    factor = newton.polar_factor(matrix, 12.0)
    torch.testing.assert_close(factor.T @ factor, torch.eye(40), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [1, 7, 96, 97, 300, 531])
def test_blocked_inverses_and_gram(width: int, generator: torch.Generator) -> None:
    x = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x[0, 0] = float(width == 1)  # a pivot that must move
    torch.testing.assert_close(blocks.inverse_transpose(x), torch.linalg.inv(x).T, rtol=1e-7, atol=1e-7)
    square = x.T @ x
    torch.testing.assert_close(blocks.gram(x), square)
    definite = square + width * torch.eye(width, dtype=torch.float64)
    expected = torch.linalg.inv(definite)
    torch.testing.assert_close(blocks.definite_inverse_(definite), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kappa", [1.001, 1.3, 2.5, 9.0])
@pytest.mark.parametrize("poles", [1, 2, 3, 5])
def test_the_rational_function_is_minimax(kappa: float, poles: int) -> None:
    """``f - 1`` takes its extreme 2 poles + 2 times with alternating sign: no other of its degree is nearer."""
    constant, terms = zolotarev.partial_fractions(kappa, poles)
    x = torch.linspace(1 / kappa, 1, 40001, dtype=torch.float64)
    off = x * (constant + sum(a / (x * x + c) for c, a in terms)) - 1
    largest = float(off.abs().max())
    assert largest <= 1.05 * zolotarev.error(kappa, poles) + 1e-14
    if largest > 1e-12:  # else rounding
        signs = off[off.abs() > (1 - 1e-3) * largest].sign()
        assert int((signs[1:] != signs[:-1]).sum()) + 1 == 2 * poles + 2


def test_the_polynomial_schedule_is_minimax() -> None:
    """The four extremes of each error: at both ends of its widened interval and where the slope is zero inside.

    They are equal, up to the common scale that recentres a cushioned step (its bottom is not the interval's).
    """
    low, high = 2 * polynomial.REACH, 2.0
    for a, b, c in polynomial.SCHEDULE[:-2]:
        bottom, top = max(low, 0.0240733 * 1.01 * high), 1.01 * high
        root = math.sqrt(9 * b * b - 20 * a * c)
        peak, dip = (math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
        values = [a * x + b * x**3 + c * x**5 for x in (bottom, peak, dip, top)]
        assert values[0] == pytest.approx(values[2], abs=1e-4)
        assert values[1] == pytest.approx(values[3], abs=1e-4)
        if low == bottom and low > 0.1:
            assert values[1] - 1 == pytest.approx(1 - values[0], abs=1e-4)
        low, high = a * low + b * low**3 + c * low**5, values[1]
    assert low > 0.85 and high < 1.15
    assert polynomial.schedule(1e-3) == polynomial.SCHEDULE
    assert [len(polynomial.schedule(ridge)) for ridge in (2e-2, 1e-4, 1e-6, 1e-12)] == [12, 16, 19, 24]


@pytest.mark.parametrize("width", [1, 2, 65, 400])
def test_the_norm_is_exact_enough_without_a_gap(width: int, generator: torch.Generator) -> None:
    random = torch.randn(width, width, generator=generator)
    for matrix in (random, torch.eye(width), torch.zeros(width, width), random[:, :1] @ random[:1]):
        expected = torch.linalg.matrix_norm(matrix, 2)
        torch.testing.assert_close(covariance.spectral_norm(matrix), expected, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("solver", SOLVERS)
def test_repeated_powers_do_not_run_away(solver: Any) -> None:
    """Many random banks: the largest singular value sits at the end of the polynomial's interval each time."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        bank = drifted_bank(50, 24, 0.5, generator)
        got = procrustes_rotation(*bank, ridge=1e-2, solver=solver)
        torch.testing.assert_close(got.T @ got, torch.eye(24), rtol=0, atol=1e-5)


def test_a_reflection_is_kept_unless_the_determinant_is_fixed(generator: torch.Generator) -> None:
    frozen = draw_unit_rows(80, 12, generator)
    mirror = torch.diag(torch.tensor([1.0] * 11 + [-1.0]))
    labels = torch.zeros(80, dtype=torch.int64)
    tuned = frozen @ mirror
    free = procrustes_rotation(frozen, tuned, labels, 0.0, "svd", centred=False)
    torch.testing.assert_close(free, mirror, rtol=0, atol=1e-5)
    fixed = procrustes_rotation(frozen, tuned, labels, 0.0, det_fix=True)
    assert torch.linalg.det(fixed.double()).item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(fixed.T @ fixed, torch.eye(12), rtol=0, atol=1e-5)


def test_the_sign_of_the_determinant_survives_where_the_determinant_underflows() -> None:
    """At D = 512 fp32 loses det of a product of rounding errors; an LU's signs do not."""
    generator = torch.Generator().manual_seed(5)
    frozen = draw_unit_rows(600, 128, generator)
    tuned = frozen.clone()
    tuned[:, 0] *= -1
    fixed = procrustes_rotation(frozen, tuned, torch.zeros(600, dtype=torch.int64), 0.0, det_fix=True)
    torch.testing.assert_close(fixed.T @ fixed, torch.eye(128), rtol=0, atol=1e-5)
    assert torch.linalg.slogdet(fixed.double()).sign == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_autocast_does_not_reach_the_solver(solver: Any, generator: torch.Generator) -> None:
    bank = drifted_bank(50, 32, 0.3, generator)
    expected = procrustes_rotation(*bank, solver=solver)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(procrustes_rotation(*bank, solver=solver), expected)


def test_bf16_banks_and_float64(generator: torch.Generator) -> None:
    frozen, tuned, labels = drifted_bank(60, 24, 0.3, generator)
    stored = frozen.to(torch.bfloat16), tuned.to(torch.bfloat16)
    got = procrustes_rotation(*stored, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact(*stored, labels, 1e-3), rtol=0, atol=3e-4)
    wide = procrustes_rotation(frozen.double(), tuned.double(), labels, solver="svd")
    torch.testing.assert_close(wide, exact(frozen, tuned, labels, 1e-3), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"ridge": -1.0}, "ridge must be finite and >= 0; got -1.0"),
        ({"ridge": 0.0, "solver": "polar"}, "polar solver needs ridge > 0"),
        ({"det_fix": True, "solver": "polar"}, "det_fix=True: use solver='svd'"),
        ({"solver": "qr"}, "solver must be one of auto, newton, polar, svd; got 'qr'"),
        ({"ridge": 0.0, "impl": "native"}, "newton solver needs ridge > 0"),
        ({"solver": "polar", "impl": "reference"}, "impl='reference' is the SVD"),
        ({"impl": "cuda"}, "impl must be one of"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        procrustes_rotation(
            torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), **options
        )
