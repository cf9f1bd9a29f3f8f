"""Conversion of BatchNorm layers, the definition; also its only implementation.

All layers of a network are 26,560 channels in ResNet-50: 0.6 MB once a run, a handful of torch operations on one
float64 vector. There is nothing that a kernel could save.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double() for tensor in tensors])


def _stored(targets: list[Tensor], like: list[Tensor]) -> Tensor:
    """Float64 of what will lie in the buffers: what the layer divides by later, rounding included."""
    return _flat([target.to(own.dtype) for target, own in zip(targets, like, strict=True)])


@torch.no_grad()
def convert_batchnorm(
    weights: list[Tensor],
    biases: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    target_means: list[Tensor],
    target_vars: list[Tensor],
    eps: list[float],
    max_ratio: float,
) -> Tensor:
    """Writes the first four lists; returns weight ratios of all channels, float64, layer after layer."""
    sizes = [weight.shape[0] for weight in weights]
    epsilon = torch.cat(
        [v.new_full(v.shape, e, dtype=torch.float64) for v, e in zip(running_vars, eps, strict=True)]
    )
    mean, spread = _flat(running_means), _flat(running_vars) + epsilon
    new_var = _stored(target_vars, running_vars)
    if math.isfinite(max_ratio):
        bounded = (new_var + epsilon).clamp(spread / max_ratio**2, spread * max_ratio**2) - epsilon
        new_var = _stored(list(bounded.clamp_min(0).split(sizes)), running_vars)
    new_mean = _stored(target_means, running_means)

    weight = _flat(weights)
    scale = spread.sqrt()
    ratio = (new_var + epsilon).sqrt() / scale
    new_bias = _flat(biases) + (new_mean - mean) * weight / scale
    for own, values in (
        (weights, weight * ratio),
        (biases, new_bias),
        (running_means, new_mean),
        (running_vars, new_var),
    ):
        torch._foreach_copy_(own, list(values.split(sizes)))
    return ratio
