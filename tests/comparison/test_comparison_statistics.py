"""The tests behind a table's p values, against tables, closed forms and counts by hand."""

from __future__ import annotations

import math

import pytest

from mooring.comparison.statistics import paired, sign_flip, t_quantile, t_two_sided, what_it_can_show


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (10, 2.22814), (30, 2.04227)],
)
def test_quantiles_are_those_of_the_printed_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=6e-6 * quantile)
    assert t_two_sided(quantile, freedom) == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 4.0, -4.0, 40.0])
def test_the_distribution_has_its_closed_forms(t: float) -> None:
    assert t_two_sided(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(abs(t)), abs=1e-14)
    assert t_two_sided(t, 2) == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t), abs=1e-14)


@pytest.mark.parametrize("freedom", [3, 4, 7, 12])
def test_the_distribution_is_the_integral_of_its_density(freedom: int) -> None:
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    steps, t = 4000, 1.7
    width = t / steps  # Simpson's rule on [0, t]
    heights = [scale * (1 + (i * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
    weights = [1, *([4, 2] * (steps // 2))[:-1], 1]
    inside = width / 3 * math.fsum(w * h for w, h in zip(weights, heights, strict=True))
    assert t_two_sided(t, freedom) == pytest.approx(1 - 2 * inside, abs=1e-10)


def test_a_worked_example() -> None:
    """Differences 1, 2, 3: mean 2, s = 1, t = 2 sqrt 3, p = 1 - t / sqrt(2 + t^2) = 1 - sqrt(6/7)."""
    found = paired([1.0, 2.0, 3.0])
    assert (found.n, found.mean) == (3, 2.0)
    assert found.p == pytest.approx(1 - math.sqrt(6 / 7), abs=1e-12)
    assert found.half_width == pytest.approx(4.30265 / math.sqrt(3), abs=1e-5)
    assert found.p_sign_flip == 0.25  # all three signs, both ways, of eight patterns


def test_sign_flips_are_counted() -> None:
    # sums of the 8 patterns of 3, 1, -1: 3 5 1 3 -3 -1 -5 -3; at least as far as 3: six
    assert sign_flip([3.0, 1.0, -1.0]) == 6 / 8
    assert sign_flip([0.1, 0.2, -0.3]) == 1.0
    assert sign_flip([1.0] * 6) == 2 / 64
    assert sign_flip([0.5] * 20) == pytest.approx(math.erfc(math.sqrt(10)))


def test_without_spread_nothing_is_claimed() -> None:
    same = paired([0.0, 0.0, 0.0])
    assert same.p == 1.0 and math.isnan(same.half_width)
    assert math.isnan(paired([0.1, 0.1, 0.1]).p)
    assert math.isnan(paired([0.1 + 0.2, 0.3]).p), "equal but for rounding"
    one = paired([0.4])
    assert one.mean == 0.4 and math.isnan(one.p) and math.isnan(one.half_width)
    with pytest.raises(ValueError, match="at least one pair"):
        paired([])


def test_three_seeds_are_said_to_show_little() -> None:
    text = what_it_can_show(3)
    assert "2.48 standard deviations" in text
    assert "cannot go below p = 0.25" in text and "cannot reach 0.05" in text
    assert "cannot reach" not in what_it_can_show(6)
    assert "no test is made" in what_it_can_show(1)
