"""How well features tell classes apart that no classifier was trained for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1024  # queries at a time: no [N, N] matrix


def recall_at_1(features: Tensor, labels: Tensor) -> float:
    """Share of images whose nearest other image, by cosine, is of their own class (leave-one-out).

    Args:
        features: [N, D] float.
        labels: [N] int64; rows below 0 are left out. An image that is alone in its class asks no question, but
            may be another's nearest.

    Raises:
        ValueError: no class has two images.
    """
    units, labels = _units(features, labels)
    asks = torch.bincount(labels)[labels] > 1
    if not bool(asks.any()):
        raise ValueError("recall_at_1: expected a class with two images; got none")
    right = 0
    for rows in asks.nonzero().flatten().split(_CHUNK):
        cosines = units[rows] @ units.T
        cosines[torch.arange(len(rows), device=rows.device), rows] = -torch.inf  # not itself
        right += int((labels[cosines.argmax(1)] == labels[rows]).sum())
    return right / int(asks.sum())


def nearest_mean_accuracy(
    features: Tensor, labels: Tensor, *, shots: int = 5, draws: int = 10, seed: int = 0
) -> float:
    """Share of images that lie nearest, by cosine, to the mean of ``shots`` images of their class.

    In each draw ``shots`` images of each class are its support, and all others are asked about; the result is the
    mean over the draws. Rows are scaled to unit length before the mean.

    Args:
        features: [N, D] float.
        labels: [N] int64; rows below 0 are left out, and so are classes with ``shots`` images or fewer.
        shots: images in a class mean.
        draws: how many supports to average over.
        seed: of the draws.

    Raises:
        ValueError: fewer than two classes have more than ``shots`` images.
    """
    units, labels = _units(features, labels)
    counts = torch.bincount(labels)
    classes = (counts > shots).nonzero().flatten()
    if shots < 1 or draws < 1 or len(classes) < 2:
        raise ValueError(
            f"nearest_mean_accuracy: expected shots >= 1, draws >= 1 and two classes with more than {shots} images; "
            f"got {draws} draws, {len(classes)} such classes"
        )
    members = [(labels == c).nonzero().flatten().cpu() for c in classes]
    generator = torch.Generator().manual_seed(seed)
    shares = []
    for _ in range(draws):
        order = [rows[torch.randperm(len(rows), generator=generator)] for rows in members]
        means = torch.stack([units[rows[:shots].to(units.device)].mean(0) for rows in order])
        asked = torch.cat([rows[shots:] for rows in order]).to(units.device)
        truth = torch.repeat_interleave(torch.tensor([len(rows) - shots for rows in order]))
        answers = (units[asked] @ F.normalize(means, dim=1).T).argmax(1).cpu()
        shares.append(float((answers == truth).double().mean()))
    return sum(shares) / draws


def _units(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"expected features [N, D] and labels [N]; got {list(features.shape)} and {list(labels.shape)}"
        )
    valid = labels >= 0
    return F.normalize(features[valid].float(), dim=1), labels[valid]
