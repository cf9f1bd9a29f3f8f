"""InfoNCE against a queue by the library's GEMMs, chunk by chunk: rows too wide for the registers of a program."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 8192  # of the queue at once: enough for the GEMMs, and the logits do not grow with N


class Sums(NamedTuple):
    """Over the keys of a queue, per query; fp32.

    Attributes:
        peak: [B] largest logit, -inf where there is no key.
        total: [B] sum of ``exp(logit - peak)``.
        positive_sum: [B] sum of the positives' logits.
        positives: [B] their number.
        weighted: [B, D] sum of ``exp(logit - peak) k``; as given where not asked for.
        positive_keys: [B, D] sum of the positives' keys; as given where not asked for.
    """

    peak: Tensor
    total: Tensor
    positive_sum: Tensor
    positives: Tensor
    weighted: Tensor
    positive_keys: Tensor


def sums_in_chunks(
    scaled: Tensor, labels: Tensor, queue: Tensor, queue_labels: Tensor, *, with_keys: bool
) -> Sums:
    """What the contrast and its gradient need of the queue; ``scaled`` are the queries over T, [B, D] fp32."""
    peak = scaled.new_full(scaled.shape[:1], -torch.inf)
    total, positive_sum, positives = (torch.zeros_like(peak) for _ in range(3))
    weighted, positive_keys = (torch.zeros_like(scaled) if with_keys else scaled[:0] for _ in range(2))
    with torch.autocast(scaled.device.type, enabled=False):
        for begin in range(0, queue.shape[0], _ROWS):
            keys, key_labels = queue[begin : begin + _ROWS].float(), queue_labels[begin : begin + _ROWS]
            filled = key_labels >= 0
            logits = (scaled @ keys.T).masked_fill_(~filled, -torch.inf)
            raised = torch.maximum(peak, logits.amax(1))
            origin = torch.where(raised == -torch.inf, 0, raised)
            shrink = torch.exp(peak - origin)
            match = (labels[:, None] == key_labels) & filled
            positive_sum += torch.where(match, logits, 0).sum(1)
            positives += match.sum(1)
            weights = logits.sub_(origin[:, None]).exp_()
            total = total * shrink + weights.sum(1)
            if with_keys:
                weighted = (weighted * shrink[:, None]).addmm_(weights, keys)
                positive_keys.addmm_(match.float(), keys)
            peak = raised
    return Sums(peak, total, positive_sum, positives, weighted, positive_keys)


def queue_info_nce_in_chunks(
    query: Tensor,
    own_key: Tensor | None,
    labels: Tensor,
    queue: Tensor,
    queue_labels: Tensor,
    temperature: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and positives [B], gradient of the query [B, D], factor of the own key's gradient [B]; all fp32."""
    valid = labels >= 0
    scaled = torch.where(valid[:, None], query.float() / temperature, 0)
    peak, total, positive_sum, positives, weighted, positive_keys = sums_in_chunks(
        scaled, labels, queue, queue_labels, with_keys=needs[0]
    )
    own = None if own_key is None else torch.where(valid[:, None], own_key.float(), 0)
    own_term: Tensor | float = 0.0
    origin = torch.where(peak == -torch.inf, 0, peak)
    if own is not None:
        own_logit = (scaled * own).sum(1)
        raised = torch.maximum(peak, own_logit)
        own_term, shrink, origin = torch.exp(own_logit - raised), torch.exp(peak - raised), raised
        total, weighted = total * shrink + own_term, weighted * shrink[:, None] if needs[0] else weighted
        positive_sum, positives = positive_sum + own_logit, positives + 1
    counted = valid & (positives > 0)
    positives = torch.where(counted, positives, 0)
    share, total = 1 / positives.clamp_min(1), torch.where(counted, total, 1)
    losses = torch.where(counted, total.log() + (origin - positive_sum * share) + share.log(), 0)
    slope = own_term / total - share  # of the loss in the own logit
    grad_query, own_factor = scaled.new_empty(0), scaled.new_empty(0)
    if needs[0]:
        grad_query = weighted / total[:, None] - positive_keys * share[:, None]
        if own is not None:
            grad_query += slope[:, None] * own
        grad_query = torch.where(counted[:, None], grad_query / temperature, 0)
    if needs[1]:
        own_factor = torch.where(counted, slope / temperature, 0)
    return losses, positives, grad_query, own_factor
