"""Features mixed with hard partners of the same batch, for Core-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

# A mixed negative is mostly its partner.
_LEAST_PARTNER_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Draws:
    """What chance decides about a batch.

    Attributes:
        order: [B] float32; sorting it puts the rows into random order.
        partner_share: [B] float32, share of the random partner, in [0.8, 1].
        positive_share: [B] float32, share of the hard positive, in [0, 1].
    """

    order: Tensor
    partner_share: Tensor
    positive_share: Tensor

    @classmethod
    def of(cls, rows: int, alpha: float, generator: Generator, device: torch.device) -> Self:
        """One number of ``generator`` (CPU) seeds all: its state is all the state, and rows at the end of a batch
        do not move what is drawn for those before them."""
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        order, partner, positive = (np.random.default_rng((seed, stream)) for stream in range(3))
        shares = (
            order.random(rows),
            np.maximum(partner.beta(alpha, alpha, rows), _LEAST_PARTNER_SHARE),
            positive.beta(alpha, alpha, rows),
        )
        return cls(*(torch.from_numpy(s).float().to(device, non_blocking=True) for s in shares))


@dataclass(frozen=True, slots=True)
class MixedRows:
    """The rows of a batch, then those mixed with a random partner, then the hard positives; N = 3 B.

    Attributes:
        features: [N, D] float32.
        targets: [N, C] float32 label distributions; zeros where a row does not count.
        classes: [N] int64, the class of rows of one class; -1 where two are mixed.
        valid: [N] bool, rows that count.
    """

    features: Tensor
    targets: Tensor
    classes: Tensor
    valid: Tensor


def hard_mixed(
    features: Tensor, labels: Tensor, classes: int, draws: Draws, *, release: bool = False
) -> MixedRows:
    """Rows ``f_i``; ``(1 - s) f_i + s f_j`` with a random partner j; ``s f_pos + (1 - s) f_neg``; labels mixed alike.

    pos is the row of the same class with the smallest cosine to i, i itself where it is alone; neg the row of
    another class with the largest. Without any row of another class there is no hard row for i. Partners are
    another valid row, i itself where it is alone. Shares s: ``draws``. Rows with label -1 take no part.

    Args:
        features: [B, D] float32, with graph.
        labels: [B] int64; -1 on padding rows.
        classes: C.
        draws: shares and order.
        release: as the public code: masked cosines count as 0 in both searches and a farthest positive at index 0
            becomes i; rows ``f_i`` are detached.
    """
    valid = labels >= 0
    partner = _ring(draws.order, valid)
    positive, negative, has_negative = hard_partners(features.detach(), labels, release=release)
    partner_share, positive_share = draws.partner_share[:, None], draws.positive_share[:, None]
    one_hot = F.one_hot(labels.clamp_min(0), classes).float() * valid[:, None]

    def mixed(rows: Tensor) -> tuple[Tensor, Tensor]:
        beside = (1 - partner_share) * rows + partner_share * rows[partner]
        hard = positive_share * rows[positive] + (1 - positive_share) * rows[negative]
        return beside, hard

    def only_or_mixed(first: Tensor, second: Tensor) -> Tensor:
        return torch.where(first == second, first, -1)

    hard_valid = valid & has_negative
    mixed_targets, hard_targets = mixed(one_hot)
    return MixedRows(
        torch.cat([features.detach() if release else features, *mixed(features)]),
        torch.cat([one_hot, mixed_targets, hard_targets * hard_valid[:, None]]),
        torch.cat(
            [
                labels,
                only_or_mixed(labels, labels[partner]),
                torch.where(hard_valid, only_or_mixed(labels[positive], labels[negative]), -1),
            ]
        ),
        torch.cat([valid, valid, hard_valid]),
    )


def hard_partners(
    features: Tensor, labels: Tensor, *, release: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Farthest row of the same class [B], nearest row of another class [B], and whether there is one [B] bool."""
    valid = labels >= 0
    units = F.normalize(features, dim=1)
    cosines = units @ units.T
    own = torch.arange(labels.shape[0], device=labels.device)
    same = (labels[:, None] == labels) & (own[:, None] != own) & valid
    other = (labels[:, None] != labels) & valid
    if release:
        # zeros for what is masked; only padding, which the public code does not have, is out of reach
        farthest = (cosines * same).masked_fill(~valid, torch.inf).argmin(1)
        nearest = (cosines * other).masked_fill(~valid, -torch.inf).argmax(1)
        return torch.where(farthest == 0, own, farthest), nearest, torch.ones_like(valid)
    farthest = cosines.masked_fill(~same, torch.inf).argmin(1)
    nearest = cosines.masked_fill(~other, -torch.inf).argmax(1)
    return torch.where(same.any(1), farthest, own), nearest, other.any(1)


def _ring(order: Tensor, valid: Tensor) -> Tensor:
    """Valid rows in one random ring, each with the next; padding rows with themselves."""
    ring = torch.argsort(torch.where(valid, order, order + 2.0))  # valid rows first
    place = torch.arange(order.shape[0], device=order.device)
    count = valid.sum()
    following = torch.where(place < count, (place + 1) % count.clamp_min(1), place)
    return torch.empty_like(ring).scatter_(0, ring, ring[following])
