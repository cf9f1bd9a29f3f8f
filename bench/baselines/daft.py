"""DAFT's statistics and conversion as its public code computes them, re-stated (github hsh1108/DAFT, commit c0be28e).

What decides its cost is kept: the forward of every BatchNorm of a deep copy of the model is replaced by one that
makes its input contiguous (a copy, where the model runs in channels_last), then reads it three times, for the
mean, for the variance and for the normalisation. Layers are converted one by one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def batchnorm_forward(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What one BatchNorm layer does in the statistics pass.

    Args:
        x: [B, C, h, w]. The others: [C].

    Returns:
        Eval-mode output like x, mean [C] and unbiased variance [C] of the batch.
    """
    x = x.contiguous()
    mean, var = torch.mean(x, dim=[0, 2, 3]), torch.var(x, dim=[0, 2, 3])
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps), mean, var


@torch.no_grad()
def convert(
    weights: list[Tensor],
    biases: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    target_means: list[Tensor],
    target_vars: list[Tensor],
    eps: list[float],
) -> None:
    """Conversion in place, layer by layer, in the dtype of the parameters. Each list holds [C_l] tensors."""
    layers = zip(weights, biases, running_means, running_vars, target_means, target_vars, eps, strict=True)
    for weight, bias, mean, var, new_mean, new_var, epsilon in layers:
        bias += (new_mean - mean) * weight / torch.sqrt(var + epsilon)
        weight *= torch.sqrt(new_var + epsilon) / torch.sqrt(var + epsilon)
        mean.copy_(new_mean)
        var.copy_(new_var)
