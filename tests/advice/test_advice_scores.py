"""The probe and the evidence, against their slow definitions."""

from __future__ import annotations

import math

import pytest
import torch

from mooring.advice.logme import _best_evidence, log_evidence
from mooring.advice.recommend import standard_error
from mooring.advice.ridge import cross_validated, ridge_probe, stratified_folds


def problem(n: int, d: int, classes: int, signal: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    means = torch.randn(classes, d, generator=generator)
    return signal * means[labels] + torch.randn(n, d, generator=generator), labels


def log_density(y: torch.Tensor, x: torch.Tensor, a: float, b: float) -> float:
    """log N(y; 0, I/b + X X^T / a), written out."""
    covariance = torch.eye(len(y), dtype=torch.float64) / b + x @ x.T / a
    return float(torch.distributions.MultivariateNormal(torch.zeros(len(y)).double(), covariance).log_prob(y))


@pytest.mark.parametrize(("n", "d"), [(30, 5), (12, 20)])
def test_the_evidence_is_the_density_at_its_own_best_precisions(n: int, d: int) -> None:
    x, labels = problem(n, d, 3, 0.5)
    x, y = x.double(), (labels == 1).double()
    left, values, _ = torch.linalg.svd(x, full_matrices=False)
    score, a, b = _best_evidence(left.T @ y, float(y @ y), values.square(), n, 500)
    assert score == pytest.approx(log_density(y, x, a, b), abs=1e-8)
    for move_a in (0.7, 1.0, 1.4):
        for move_b in (0.7, 1.0, 1.4):
            assert log_density(y, x, a * move_a, b * move_b) <= score + 1e-6


def test_the_evidence_is_the_mean_over_classes_and_images_and_likes_signal() -> None:
    x, labels = problem(40, 6, 2, 0.6)
    left, values, _ = torch.linalg.svd(x.double(), full_matrices=False)
    each = []
    for c in range(2):
        y = (labels == c).double()
        each.append(_best_evidence(left.T @ y, float(y @ y), values.square(), 40, 100)[0] / 40)
    assert log_evidence(x, labels, 2) == pytest.approx(sum(each) / 2)
    assert log_evidence(*problem(40, 6, 2, 2.0), 2) > log_evidence(*problem(40, 6, 2, 0.0), 2)
    # labels that the features give exactly do not end in infinity
    assert math.isfinite(log_evidence(torch.eye(4)[torch.arange(12) % 4], torch.arange(12) % 4, 4))


def test_the_probe_solves_its_normal_equations() -> None:
    x, labels = problem(25, 7, 3, 1.0)
    weight, bias, strength = ridge_probe(x, labels, 3)
    x = x.double()
    y = torch.nn.functional.one_hot(labels, 3).double()
    centred = x - x.mean(0)
    expected = torch.linalg.solve(
        centred.T @ centred + strength * torch.eye(7).double(), centred.T @ (y - y.mean(0))
    )
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(x.mean(0) @ weight + bias, y.mean(0))


def test_the_strength_is_the_best_of_real_leave_one_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = problem(18, 4, 2, 0.4)
    chosen = ridge_probe(x, labels, 2)[2]
    x, y = x.double(), torch.nn.functional.one_hot(labels, 2).double()
    unit = torch.linalg.svdvals(x - x.mean(0)).square().mean()

    def error(strength: torch.Tensor) -> float:
        total = 0.0
        for i in range(len(x)):
            kept = torch.arange(len(x)) != i
            mean_x = x[kept].mean(0)
            mean_y = y[kept].mean(0)
            inner = x[kept] - mean_x
            w = torch.linalg.solve(
                inner.T @ inner + strength * torch.eye(4).double(), inner.T @ (y[kept] - mean_y)
            )
            total += float(((x[i] - mean_x) @ w + mean_y - y[i]).square().sum())
        return total

    grid = torch.logspace(-4, 3, 15, dtype=torch.float64) * unit
    assert chosen == pytest.approx(float(min(grid, key=error)))


def test_folds_are_stratified_and_cover_each_row_once() -> None:
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 1)
    folds = list(stratified_folds(labels, 5, seed=3))
    assert torch.stack(folds).sum(0).tolist() == [1] * 16
    assert all(int((labels[fold] == 0).sum()) == 2 and int((labels[fold] == 1).sum()) == 1 for fold in folds)


def test_cross_validation_tells_signal_from_noise() -> None:
    assert cross_validated(*problem(60, 8, 3, 3.0), 3) > 0.95
    assert cross_validated(*problem(60, 8, 3, 0.0), 3) < 0.6


def test_the_standard_error_of_a_share() -> None:
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 50) == pytest.approx(math.sqrt(0.01 * 0.99 / 50)), "half an image from certain"
