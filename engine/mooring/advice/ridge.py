"""A linear probe in closed form: ridge regression on one-hot labels, its strength by leave-one-out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Strengths tried, as shares of the features' mean squared singular value.
_STRENGTHS = torch.logspace(-4, 3, 15, dtype=torch.float64)


def ridge_probe(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, float]:
    """Weights of ``min ||X W + b - Y||^2 + l ||W||^2`` with centred X and one-hot Y.

    The strength l is the one of a grid with the least leave-one-out error, which a linear smoother with hat
    matrix H has in closed form: residual_i / (1 - H_ii).

    Args:
        features: [n, D].
        labels: [n] in 0..C-1.
        num_classes: C.

    Returns:
        Weight [D, C], bias [C], both float64, and l.
    """
    x = features.double()
    y = torch.nn.functional.one_hot(labels, num_classes).double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    seen = left.T @ y
    squares = values.square()
    unit = squares.mean().clamp_min(1e-30)
    best: tuple[float, float] | None = None
    for strength in (_STRENGTHS * unit).tolist():
        shrink = squares / (squares + strength)
        fitted = left @ (shrink[:, None] * seen)
        hat = (left.square() @ shrink + 1 / len(x)).clamp_max(1 - 1e-9)  # 1/n: the mean is fitted too
        error = ((y - fitted) / (1 - hat)[:, None]).square().sum().item()
        if best is None or error < best[0]:
            best = error, strength
    assert best is not None
    weight = right.T @ ((values / (squares + best[1]))[:, None] * seen)
    return weight, mean_y - mean_x @ weight, best[1]


def cross_validated(
    features: Tensor, labels: Tensor, num_classes: int, *, folds: int = 5, seed: int = 0
) -> float:
    """Share of images that a probe fitted without them gets right; stratified folds.

    A class with a single image is only ever fitted or only ever asked for: it counts as wrong where asked.

    Args:
        features: [n, D].
        labels: [n] in 0..C-1.
        num_classes: C.
        folds: how many, at most n.
        seed: of the shuffle inside each class.
    """
    right = 0
    for held in stratified_folds(labels, folds, seed):
        weight, bias, _ = ridge_probe(features[~held], labels[~held], num_classes)
        right += int(((features[held].double() @ weight + bias).argmax(1) == labels[held]).sum())
    return right / len(labels)


def stratified_folds(labels: Tensor, folds: int, seed: int) -> Iterator[Tensor]:
    """[n] bool per fold: who is held out. Each row once; a class is spread as evenly as it goes."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].sort(stable=True).indices]  # by class, shuffled inside
    fold = torch.empty_like(labels)
    fold[order] = torch.arange(len(labels)) % min(folds, len(labels))
    for number in range(min(folds, len(labels))):
        yield fold == number
