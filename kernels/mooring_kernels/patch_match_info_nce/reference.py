"""Concept-level contrast by matched patches, the definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mooring_kernels.runtime.dispatch import working_dtype

POSITIVE_CHOICES = 3  # the positive pair is one of the three largest entries of its plan

_DOMINANT = 0.6  # of a column: more than half, with room for rounding
_GRID = 32.0  # grid points per unit of a logarithm
_LOWEST_KEY = -32767.0  # with it a code of P <= 16 is an exact fp32 integer
_SMALLEST_SHARE = 2.0**-126


def class_roles(labels: Tensor, negative_classes: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Which classes are negative for which image, and each image's own; neither for a masked row.

    Args:
        labels: [B]. negative_classes: [B, M]; what is no class or is the image's own is passed over, a
            repeated class counts once. classes: C.

    Returns:
        negative [B, C] bool, positive [B, C] bool.
    """

    def listed(indices: Tensor) -> Tensor:
        inside = (indices >= 0) & (indices < classes)
        marks = torch.zeros(indices.shape[0], classes + 1, dtype=torch.bool, device=indices.device)
        return marks.scatter_(1, torch.where(inside, indices, classes), True)[:, :classes]

    positive = listed(labels[:, None])
    return listed(negative_classes) & ~positive & positive.any(1, keepdim=True), positive


def rank_codes(cosine: Tensor, epsilon: float, rounds: int) -> Tensor:
    """Numbers whose falling order is that of the plan's entries; all differ.

    The plan of cost ``1 - cosine`` after ``rounds`` rounds from zero potentials is scaled so that each column
    sums to 1, which the last update makes exact. An entry over 0.6 has the key -log(sum of the others of its
    column), every other one its own logarithm: the order of the plan, but entries near 1 differ in more
    than their last digits. Keys are rounded to 1/32, since a converged plan holds entries that are
    equal but for rounding (those of two patches that exchange); of equal keys the lower flat index is first.

    Args:
        cosine: [..., P, P]. epsilon: entropy. rounds: of both potentials.

    Returns:
        [..., P * P] float64.
    """
    size = cosine.shape[-1]
    score, log_mass = (cosine - 1) / epsilon, math.log(1 / size + 1e-8)
    u = torch.zeros_like(score[..., :1])
    v = torch.zeros_like(score[..., :1, :])
    for _ in range(rounds):  # u and v are the potentials over epsilon
        u = log_mass - torch.logsumexp(score + v, dim=-1, keepdim=True)
        v = log_mass - torch.logsumexp(score + u, dim=-2, keepdim=True)
    own = score + u + v - log_mass
    share = own.exp()
    dominant = share > _DOMINANT
    others = share.masked_fill(dominant, 0.0).sum(-2, keepdim=True).clamp_min(_SMALLEST_SHARE)
    key = torch.where(dominant, -others.log(), own).flatten(-2)
    places = max(size * size, 256)
    rank = torch.arange(places - 1, places - 1 - size * size, -1, device=cosine.device)
    return (key * _GRID).round().clamp_min(_LOWEST_KEY).double() * places + rank


def patch_match_info_nce(
    query: Tensor,
    own_key: Tensor,
    labels: Tensor,
    queue: Tensor,
    queue_valid: Tensor,
    negative_classes: Tensor,
    positive_pick: Tensor,
    temperature: float,
    negatives_per_set: int,
    epsilon: float,
    rounds: int,
) -> Tensor:
    """Loss per image [B], 0 for a masked one; all problems are solved at once."""
    dtype = working_dtype(query, own_key, queue)
    batch, patches, width = query.shape
    classes, slots = queue_valid.shape
    entries = patches * patches
    with torch.autocast(query.device.type, enabled=False):
        negative, positive = class_roles(labels, negative_classes, classes)
        valid_row = positive.any(1)
        # a masked row and an empty slot may hold anything, and 0 times NaN would reach the gradient
        query = torch.where(valid_row[:, None, None], query.to(dtype), 0.0)
        own_key = torch.where(valid_row[:, None, None], own_key.detach().to(dtype), 0.0)
        keys = torch.where(queue_valid[:, :, None, None], queue.detach().to(dtype), 0.0)
        cosine = query.reshape(-1, width) @ keys.reshape(-1, width).T
        cosine = cosine.view(batch, patches, classes * slots, patches).transpose(1, 2)
        cosine = torch.cat([(query @ own_key.transpose(1, 2))[:, None], cosine], 1)  # [B, 1 + C K, P, P]
        with torch.no_grad():
            most = max(negatives_per_set, min(POSITIVE_CHOICES, entries))
            ranked = rank_codes(cosine, epsilon, rounds).topk(most, dim=2).indices
        best = cosine.flatten(2).gather(2, ranked) / temperature  # [B, 1 + C K, largest entries first]

        label = torch.where(valid_row, labels, 0)
        used = negative.repeat_interleave(slots, 1) & queue_valid.flatten()  # [B, C K]
        negatives = best[:, 1:, :negatives_per_set].masked_fill(~used[:, :, None], -math.inf)
        slot = 1 + label[:, None] * slots + torch.arange(slots, device=labels.device)
        sets = torch.cat([torch.zeros_like(label)[:, None], slot], 1)  # [B, 1 + K]: the positive sets
        pick = positive_pick.clamp(0, min(POSITIVE_CHOICES, entries) - 1)
        filled = torch.cat([torch.ones_like(valid_row)[:, None], queue_valid[label]], 1)
        of_sets = best.gather(1, sets[:, :, None].expand(-1, -1, best.shape[2]))
        positives = of_sets.gather(2, pick[:, :, None])[:, :, 0]

        everything = torch.cat([positives.masked_fill(~filled, -math.inf), negatives.flatten(1)], 1)
        count = filled.sum(1).to(dtype)
        mean = torch.where(filled, positives, 0.0).sum(1) / count
        return torch.where(valid_row, torch.logsumexp(everything, 1) - mean - count.log(), 0.0)
