"""Zolotarev's rational function: of all of its degree, the nearest to the sign function on ``1/kappa <= |x| <= 1``."""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache(maxsize=64)
def partial_fractions(kappa: float, poles: int) -> tuple[float, tuple[tuple[float, float], ...]]:
    """``(m, ((c_1, a_1), ...))`` of ``f(x) = x (m + sum_j a_j / (x^2 + c_j))``, all positive.

    On ``[1/kappa, 1]`` f lies within ``error(kappa, poles)`` of 1, or nearly.

    Source: Nakatsukasa and Freund, SIAM Review 58 (2016), eq. 3.4 to 3.6 and 3.11.
    """
    low = 1 / kappa
    tangents = _jacobi_tangents(math.sqrt(1 - low * low), 2 * poles + 1)
    shifts = [(low * t) ** 2 for t in tangents]
    odd, even = shifts[0::2], shifts[1::2]
    weights = [math.prod(e - c for e in even) / math.prod(o - c for o in odd if o != c) for c in odd]
    # f equioscillates about 1 once scaled; its extremes include those at the ends, f(low) least and f(1) most.
    ends = [x * (1 + sum(a / (x * x + c) for a, c in zip(weights, odd, strict=True))) for x in (low, 1.0)]
    scale = 2 / sum(ends)
    return scale, tuple((c, scale * a) for c, a in zip(odd, weights, strict=True))


def error(kappa: float, poles: int) -> float:
    """``max |f - 1|`` on the interval, from the nome of its elliptic modulus: sharp for all but the largest errors."""
    return 4 * math.exp(-(math.pi**2) * (2 * poles + 1) / (2 * math.log(4 * kappa)))


def _jacobi_tangents(modulus: float, parts: int) -> list[float]:
    """``sn / cn`` at ``j K / parts``, j = 1 .. parts - 1, by the arithmetic-geometric mean."""
    a, b = [1.0], math.sqrt(1 - modulus * modulus)
    c = [modulus]
    while c[-1] > 1e-17 and len(a) < 12:
        a.append((a[-1] + b) / 2)
        c.append((a[-2] - b) / 2)
        b = math.sqrt(a[-2] * b)
    quarter = math.pi / (2 * a[-1])
    tangents = []
    for j in range(1, parts):
        phase = 2 ** (len(a) - 1) * a[-1] * quarter * j / parts
        for mean, difference in zip(a[:0:-1], c[:0:-1], strict=True):
            phase = (phase + math.asin(difference / mean * math.sin(phase))) / 2
        tangents.append(math.tan(phase))
    return tangents
