"""What a few seeds allow to say: the paired t-test, and the exact sign-flip test beside it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True, slots=True)
class Paired:
    """Differences of n pairs, one per seed.

    Attributes:
        n: pairs.
        mean: of the differences.
        half_width: of the 95 % interval around the mean, by Student's t; NaN with fewer than two pairs, or where
            all differences are equal: no spread is no certainty.
        p: two-sided, paired t-test; NaN with fewer than two pairs, or where all differences are equal but
            not 0.
        p_sign_flip: two-sided, exact sign-flip test; never below 2 / 2^n.
    """

    n: int
    mean: float
    half_width: float
    p: float
    p_sign_flip: float


def paired(differences: Sequence[float]) -> Paired:
    """Whether the mean of paired differences is distinguishable from 0.

        t = mean / (s / sqrt(n)),   n - 1 degrees of freedom

    The t-test takes the differences as draws of one normal distribution. The sign-flip test takes them
    only as symmetric around 0 and needs six seeds before it can go below 0.05.

    Raises:
        ValueError: no differences.
    """
    n = len(differences)
    if n == 0:
        raise ValueError("expected at least one pair, got none")
    mean = math.fsum(differences) / n
    if n == 1:
        return Paired(1, mean, math.nan, math.nan, 1.0)
    spread = statistics.stdev(differences)
    # shares are read from counts: differences that are equal on paper differ by rounding
    if spread <= 1e-12 * max(abs(value) for value in differences):
        return Paired(n, mean, math.nan, 1.0 if mean == 0 else math.nan, sign_flip(differences))
    error = spread / math.sqrt(n)
    return Paired(
        n, mean, t_quantile(0.975, n - 1) * error, t_two_sided(mean / error, n - 1), sign_flip(differences)
    )


def t_two_sided(t: float, freedom: int) -> float:
    """P(|T| >= |t|) for Student's t with a whole number of degrees of freedom.

    With angle a = atan(|t| / sqrt(freedom)) the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4:

        odd:  1 - 2/pi (a + sin a (cos a + 2/3 cos^3 a + ... up to cos^(freedom-2)))
        even: 1 - sin a (1 + 1/2 cos^2 a + (1*3)/(2*4) cos^4 a + ... up to cos^(freedom-2))

    The absolute error is some 1e-15 per term, so very small p are 0 or rounding.

    Raises:
        ValueError: freedom below 1.
    """
    if freedom < 1:
        raise ValueError(f"expected at least 1 degree of freedom, got {freedom}")
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2 == 1
    total, term = 0.0, cosine if odd else 1.0
    for power in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1.0 - inside))


def t_quantile(probability: float, freedom: int) -> float:
    """The t with P(T <= t) = probability, for a probability in [0.5, 1); by bisection.

    Raises:
        ValueError: the probability is out of range.
    """
    if not 0.5 <= probability < 1:
        raise ValueError(f"expected a probability from 0.5 to 1, got {probability}")
    target, low, high = 2 * (1 - probability), 0.0, 1.0
    while t_two_sided(high, freedom) > target:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, freedom) > target else (low, middle)
    return (low + high) / 2


def sign_flip(differences: Sequence[float]) -> float:
    """Share of all 2^n sign patterns whose sum is at least as far from 0 as the one seen.

    From 17 pairs on every pattern is not tried any more: the two-sided normal approximation
    ``erfc(|sum| / sqrt(2 sum of squares))`` takes its place.
    """
    seen = abs(math.fsum(differences))
    if len(differences) > 16:
        return math.erfc(seen / math.sqrt(2 * math.fsum(d * d for d in differences))) if seen else 1.0
    limit = seen * (1 - 1e-12)  # equal sums in another order differ by rounding
    patterns = list(product((1, -1), repeat=len(differences)))
    far = sum(
        abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True))) >= limit for signs in patterns
    )
    return far / len(patterns)


def what_it_can_show(n: int) -> str:
    """In words, how little n seeds can show."""
    if n < 2:
        return "One seed shows no spread: a difference between methods may be chance, and no test is made."
    needed = t_quantile(0.975, n - 1) / math.sqrt(n)
    return (
        f"{n} seeds: the paired t-test finds p < 0.05 only where the mean difference is above {needed:.2f} "
        f"standard deviations of the differences, and it trusts that they are normal; the exact sign-flip "
        f"test cannot go below p = {2 / 2**n:.2g} with {n} seeds"
        + (", so it cannot reach 0.05 here." if 2 / 2**n > 0.05 else ".")
    )
