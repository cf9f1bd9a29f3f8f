"""Where to crop concept patches, the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels.concept_boxes.rule import BoxRule
from mooring_kernels.runtime.dispatch import working_dtype


def other_classes(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """The first ``count`` classes other than the label, by falling logit: [B, count]; count < C.

    Equal logits are taken in the order of their classes. A masked row gets -1.
    """
    classes = logits.shape[1]
    order = logits.argsort(dim=1, descending=True, stable=True)
    own = (order == labels[:, None]).int().argmax(1)  # where the label stands; counting skips it
    number = torch.arange(count, device=labels.device)
    found = order.gather(1, number + (number >= own[:, None]))
    valid = (labels >= 0) & (labels < classes)
    return torch.where(valid[:, None], found, -1)


def channel_scores(head_weight: Tensor, labels: Tensor, rivals: Tensor) -> Tensor:
    """``kappa W[y] - sum_j W[c_j]``, subtracted one after the other: equal scores tie in every implementation."""
    score = rivals.shape[1] * head_weight[labels]
    for number in range(rivals.shape[1]):
        score = score - head_weight[rivals[:, number]]
    return score


def boxes_around(x: Tensor, y: Tensor, rule: BoxRule) -> Tensor:
    """[..., 4] boxes around points in pixels: cut at the border, or shifted inside it where ``rule.centred``."""
    sides = []
    for middle, extent in ((x, rule.image_width), (y, rule.image_height)):
        low = middle - 0.5 * rule.patch_side
        if rule.centred:
            low = low.clamp(0, max(extent - rule.patch_side, 0))
            high = low + rule.patch_side
        else:
            high = middle + 0.5 * rule.patch_side
        sides.append((low.clamp_min(0), high.clamp_max(extent)))
    (left, right), (top, bottom) = sides
    return torch.stack((left, top, right, bottom), -1)


def concept_boxes(
    feature_map: Tensor, logits: Tensor, labels: Tensor, head_weight: Tensor, rule: BoxRule
) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(feature_map, logits, head_weight)
    batch, width, rows, columns = feature_map.shape
    classes, device = head_weight.shape[0], feature_map.device
    valid = (labels >= 0) & (labels < classes)
    index = torch.where(valid, labels, 0)

    others = other_classes(logits.to(dtype), labels, max(rule.rivals, rule.negatives))
    rivals = torch.where(valid[:, None], others[:, : rule.rivals], 0)
    rank = channel_scores(head_weight.to(dtype), index, rivals).argsort(dim=1, descending=True, stable=True)
    first = rule.rank_stride * torch.arange(rule.patches, device=device)
    group = rank[:, first[:, None] + torch.arange(rule.group_width, device=device)]  # [B, P, w]
    flat = feature_map.reshape(batch, width, rows * columns).to(dtype)
    taken = flat.gather(1, group.flatten(1)[..., None].expand(-1, -1, rows * columns))
    response = taken.view(*group.shape, rows * columns).sum(2)  # [B, P, N]
    peak = response.argmax(2)

    inside = 0.5 if rule.centred else 0.0
    x = ((peak % columns).float() + inside) * (rule.image_width / columns)
    y = ((peak // columns).float() + inside) * (rule.image_height / rows)
    found = boxes_around(x, y, rule)
    middle = boxes_around(
        torch.full_like(x, 0.5 * rule.image_width),
        torch.full_like(y, 0.5 * rule.image_height),
        rule.shifted(),
    )
    return torch.where(valid[:, None, None], found, middle), others[:, : rule.negatives]
