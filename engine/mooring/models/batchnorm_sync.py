"""BatchNorm in train mode over the images of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mooring.collectives import all_reduce_, summed
from mooring.distributed import ALONE, Ranks
from mooring.models.torchvision_shim import import_timm

timm = import_timm()


def batch_statistics(x: Tensor, ranks: Ranks, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance (both [C], with gradient) and number of values of each channel, over all ranks.

    Two exchanges, the variance around the mean of all: the difference of two large sums would lose it in fp32.

    Args:
        x: [B, C, ...], at least fp32.
        ranks: whose rows count.
        weight: [B, 1, ...], 1 for rows that count and 0 for others; None: all count.
    """
    dims = [d for d in range(x.ndim) if d != 1]
    counted = x if weight is None else x * weight
    here = x.new_full((), x.numel() / x.shape[1]) if weight is None else weight.sum()
    count = all_reduce_(here.clone(), ranks, "batch statistics")
    some = count.clamp_min(1)
    mean = summed(counted.sum(dims), ranks, "batch statistics") / some
    centred = x - mean.view([-1 if d == 1 else 1 for d in range(x.ndim)])
    if weight is not None:
        centred = centred * weight
    return mean, summed(centred.square().sum(dims), ranks, "batch statistics") / some, count


def batch_norm(layer: Any, x: Tensor, ranks: Ranks) -> Tensor:
    """What ``layer`` does in train mode, with the statistics of all ranks; moves its running statistics likewise."""
    values = x.float()
    mean, variance, count = batch_statistics(values, ranks)
    if layer.training and layer.track_running_stats and layer.running_mean is not None:
        with torch.no_grad():
            layer.num_batches_tracked.add_(1)
            share = layer.momentum
            if share is None:  # the mean of all batches
                share = 1.0 / layer.num_batches_tracked.to(mean.dtype)
            layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), share)
            unbiased = variance * count / (count - 1).clamp_min(1)
            layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), share)
    shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
    out = (values - mean.view(shape)) * torch.rsqrt(variance + layer.eps).view(shape)
    if layer.weight is not None:
        out = out * layer.weight.view(shape)
    if layer.bias is not None:
        out = out + layer.bias.view(shape)
    return out.to(x.dtype)


class _Synchronised:
    """Mixed into a BatchNorm class: batch statistics over all ranks, in train mode."""

    ranks = ALONE

    def normalised(self: Any, x: Tensor) -> Tensor:
        if self.training or self.running_mean is None:
            return batch_norm(self, x, self.ranks)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class SynchronisedNorm1d(_Synchronised, nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return self.normalised(input)


class SynchronisedNorm2d(_Synchronised, nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return self.normalised(input)


class SynchronisedNormAct2d(_Synchronised, timm.layers.BatchNormAct2d):  # type: ignore[name-defined]
    """timm's BatchNorm with the dropout and activation that follow it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self.normalised(x)))


_SYNCHRONISED: dict[type[nn.Module], type[_BatchNorm]] = {
    nn.BatchNorm1d: SynchronisedNorm1d,
    nn.BatchNorm2d: SynchronisedNorm2d,
    timm.layers.BatchNormAct2d: SynchronisedNormAct2d,
}


def synchronise_statistics_(module: nn.Module, ranks: Ranks) -> int:
    """Makes every BatchNorm inside use the batch statistics of all ranks, in place; weights, buffers, names stay.

    Classes of our own that have an attribute ``ranks`` know how; of others, torch's and timm's usual ones.

    Returns:
        How many layers.
    """
    count = 0
    for layer in module.modules():
        if not isinstance(layer, _BatchNorm):
            continue
        if type(layer) in _SYNCHRONISED:
            layer.__class__ = _SYNCHRONISED[type(layer)]
        if hasattr(layer, "ranks"):
            layer.__dict__["ranks"] = ranks
            count += 1
    return count


@torch.no_grad()
def average_statistics_(module: nn.Module, ranks: Ranks) -> None:
    """Gives every rank the mean of the ranks' running statistics, where they may have drifted apart."""
    if ranks.world == 1:
        return
    tensors = [
        buffer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm)
        for buffer in (layer.running_mean, layer.running_var)
        if buffer is not None
    ]
    if not tensors:
        return
    flat = all_reduce_(torch.cat([t.flatten() for t in tensors]), ranks, "running statistics")
    flat /= ranks.world
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def merged_buffers(by_rank: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One set of buffers in place of those of several ranks: equal ones as they are, means of running statistics.

    Args:
        by_rank: buffers by name, the same names and shapes on each rank; a tensor of one rank is held at a time.
    """
    merged: dict[str, Tensor] = {}
    for name in by_rank[0]:
        first = by_rank[0][name]
        total, same = first.double(), True
        for buffers in by_rank[1:]:
            tensor = buffers[name]
            same = same and torch.equal(tensor, first)
            total = total + tensor.double()
        merged[name] = first if same else (total / len(by_rank)).to(first.dtype)
    return merged
