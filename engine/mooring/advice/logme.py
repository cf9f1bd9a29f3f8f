"""LogME: how probable the labels are under a linear model on frozen features, its weights integrated out."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_evidence(features: Tensor, labels: Tensor, num_classes: int, *, rounds: int = 100) -> float:
    """Mean over classes of ``max over a, b of log p(y | F, a, b) / n``, y the class against the rest.

    The model is ``y = F w + noise`` with ``w ~ N(0, I/a)`` and noise of precision b, so
    ``y ~ N(0, I/b + F F^T / a)``. With the singular values s and z = U^T y, one round of the fixed point is

        gamma = sum_j b s_j^2 / (a + b s_j^2),   a = gamma / |m|^2,   b = (n - gamma) / |y - F m|^2

    where m is the posterior mean; all of it costs one SVD and a few vectors of length min(n, D) per round.

    Args:
        features: [n, D].
        labels: [n] in 0..C-1.
        num_classes: C.
        rounds: at most so many per class.

    Source: You et al., "LogME", ICML 2021; the fixed point is MacKay's.
    """
    x = features.double()
    left, values, _ = torch.linalg.svd(x, full_matrices=False)
    squares = values.square()
    scores = []
    for index in range(num_classes):
        y = (labels == index).double()
        scores.append(_best_evidence(left.T @ y, float(y @ y), squares, len(y), rounds)[0])
    return sum(scores) / len(scores) / len(labels)


def _best_evidence(
    z: Tensor, total: float, squares: Tensor, n: int, rounds: int
) -> tuple[float, float, float]:
    """Evidence at the fixed point, with its a and b.

    Args:
        z: U^T y, [k].
        total: |y|^2.
        squares: s^2, [k].
        n: rows.
        rounds: at most so many.
    """
    outside = max(total - float(z @ z), 0.0)  # of y, what no feature reaches
    a, b, score = 1.0, 1.0, -math.inf
    best = score, a, b
    for _ in range(rounds):
        width = a + b * squares
        mean_squared = float((b * b * squares * z.square() / width.square()).sum())
        error = float((a * z / width).square().sum()) + outside
        before, score = score, _evidence(a, b, error, mean_squared, width, n)
        if score > best[0]:
            best = score, a, b
        if abs(score - before) <= 1e-10 * n:
            break
        gamma = float((b * squares / width).sum())
        # floors: labels that the features give exactly, or not at all, would send a or b to infinity
        a = min(max(gamma / max(mean_squared, 1e-12), 1e-12), 1e12)
        b = min(max((n - gamma) / max(error, 1e-12), 1e-12), 1e12)
    return best


def _evidence(a: float, b: float, error: float, mean_squared: float, width: Tensor, n: int) -> float:
    """log N(y; 0, I/b + F F^T / a) by its posterior mean; the D - k directions outside F cancel."""
    logs = len(width) * math.log(a) + n * math.log(b) - float(width.log().sum()) - n * math.log(2 * math.pi)
    return 0.5 * (logs - b * error - a * mean_squared)
