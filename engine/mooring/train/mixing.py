"""Mixup and CutMix as plain functions of a batch, and the targets they make."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor


@dataclass(frozen=True, slots=True)
class Mixed:
    """A mixed batch: row i is ``lam`` of class ``labels[i]`` and ``1 - lam`` of ``partner_labels[i]``.

    Attributes:
        images: [B, 3, H, W]; padding rows as they came.
        labels, partner_labels: [B] int64; -1 in both marks a padding row.
        lam: share of the first label, in [0, 1].
        partner: [B] int64, the row mixed in.
    """

    images: Tensor
    labels: Tensor
    partner_labels: Tensor
    lam: float
    partner: Tensor

    def soft_targets(self, num_classes: int) -> Tensor:
        """Target distributions [B, C] float32; rows of zeros where padded."""
        first = soft_targets(self.labels, num_classes)
        second = soft_targets(self.partner_labels, num_classes)
        return self.lam * first + (1 - self.lam) * second


def mix(images: Tensor, labels: Tensor, *, mixup: float, cutmix: float, generator: Generator) -> Mixed:
    """Mixes a batch by mixup or CutMix; where both are on, a fair coin decides per batch.

    Every valid row gets one other valid row as partner (itself only where it is alone); rows with label -1
    are neither changed nor mixed in. The input is not written to, and the host never waits for the device.

    Args:
        images: [B, 3, H, W].
        labels: [B] int64, -1 on padding rows.
        mixup: alpha of mixup's Beta distribution; 0 is off.
        cutmix: alpha of CutMix's Beta distribution; 0 is off.
        generator: a CPU generator of the caller's own; its state is all the state there is.

    Source: Zhang et al., ICLR 2018; Yun et al., ICCV 2019.
    """
    kind = _choose(mixup, cutmix, generator)
    partner = _partners(labels, generator)
    if kind is None:
        return Mixed(images, labels, labels, 1.0, torch.arange(len(labels), device=labels.device))
    lam = _beta(mixup if kind == "mixup" else cutmix, generator)
    if kind == "mixup":
        # lerp, so that a padding row (its own partner) comes out bit for bit
        mixed = torch.lerp(images, images[partner], 1 - lam)
    else:
        top, bottom, left, right = _box(images.shape[-2], images.shape[-1], lam, generator)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
        # the box was cut to whole pixels inside the image: count what was really pasted
        lam = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
    return Mixed(mixed, labels, labels[partner], lam, partner)


def soft_targets(labels: Tensor, num_classes: int) -> Tensor:
    """One-hot rows [B, C] float32; rows of zeros where the label is -1. Smoothing is the loss's part."""
    return F.one_hot(labels.clamp_min(0), num_classes).float() * (labels >= 0).unsqueeze(1)


def _choose(mixup: float, cutmix: float, generator: Generator) -> Literal["mixup", "cutmix"] | None:
    if mixup > 0 and cutmix > 0:
        return "mixup" if float(torch.rand((), generator=generator)) < 0.5 else "cutmix"
    if mixup > 0:
        return "mixup"
    return "cutmix" if cutmix > 0 else None


def _beta(alpha: float, generator: Generator) -> float:
    # torch has no Beta with a generator; a seed drawn from ours keeps all state in one place
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def _partners(labels: Tensor, generator: Generator) -> Tensor:
    """Valid rows in one random ring, each with the next; padding rows with themselves."""
    size = len(labels)
    valid = labels >= 0
    keys = torch.rand(size, generator=generator).to(labels.device, non_blocking=True)
    ring = torch.argsort(torch.where(valid, keys, keys + 2.0))  # valid rows first, in random order
    place = torch.arange(size, device=labels.device)
    count = valid.sum()
    following = torch.where(place < count, (place + 1) % count.clamp_min(1), place)
    return torch.empty_like(ring).scatter_(0, ring, ring[following])


def _box(height: int, width: int, lam: float, generator: Generator) -> tuple[int, int, int, int]:
    """A box of about ``1 - lam`` of the image around a random centre, cut to the image."""
    share = math.sqrt(1 - lam)
    half_height, half_width = int(height * share) // 2, int(width * share) // 2
    row = int(torch.randint(height, (), generator=generator))
    column = int(torch.randint(width, (), generator=generator))
    return (
        max(0, row - half_height),
        min(height, row + half_height),
        max(0, column - half_width),
        min(width, column + half_width),
    )
