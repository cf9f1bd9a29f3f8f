"""What the public code of Concept-Tuning computes, in our words: the facts only."""

from __future__ import annotations

import torch
from torch import Tensor


def boxes(
    feature_map: Tensor, logits: Tensor, labels: Tensor, head_weight: Tensor, side: int, negatives: int
) -> tuple[Tensor, Tensor]:
    """One image and one group after the other: an argsort per image, a device-to-host read per box.

    Nine groups of 30 channels, 250 ranks apart, for D = 2048; other widths by the scale of the specification.
    """
    width = feature_map.shape[1]
    group, stride = max(1, round(30 * width / 2048)), 250 * width // 2048
    cell = side // feature_map.shape[3]
    found, others = [], []
    for image, y, label in zip(feature_map, logits, labels.tolist(), strict=True):
        order = y.argsort(descending=True, stable=True)
        order = order[order != label]
        rivals = order[:3]
        score = 3 * head_weight[label] - head_weight[rivals].sum(0)
        rank = score.argsort(descending=True, stable=True)
        rows = []
        for number in range(9):
            response = image[rank[number * stride : number * stride + group]].sum(0)
            row, column = divmod(int(response.argmax()), response.shape[1])
            x, y_pixel = cell * column, cell * row
            rows.append([max(0, x - 32), max(0, y_pixel - 32), min(side, x + 32), min(side, y_pixel + 32)])
        found.append(rows)
        others.append(order[:negatives])
    return torch.tensor(found, dtype=torch.float32, device=feature_map.device), torch.stack(others)


def ema(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    """Parameter by parameter, with a new tensor for each."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(target * momentum + source * (1 - momentum))
