"""The classifier on top of the encoder."""

from __future__ import annotations

import torch
from torch import nn


def build_head(
    feature_dim: int,
    num_classes: int,
    *,
    std: float = 0.01,
    generator: torch.Generator | None = None,
) -> nn.Linear:
    """A linear classifier with weight ~ N(0, std^2) and zero bias.

    Small weights make the first softmax nearly uniform, so that the first gradients into a pretrained
    encoder are small too.

    Args:
        feature_dim: D.
        num_classes: C.
        std: standard deviation of the weights.
        generator: CPU generator to draw from; None: torch's global one.

    Returns:
        Linear with weight [C, D] and bias [C], float32.
    """
    head = nn.Linear(feature_dim, num_classes)
    nn.init.normal_(head.weight, std=std, generator=generator)
    nn.init.zeros_(head.bias)
    return head
