"""BatchNorm layers that draw, channel by channel, between batch statistics and moving statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mooring.distributed import ALONE
from mooring.models.batchnorm_sync import batch_norm
from mooring.models.torchvision_shim import import_timm

timm = import_timm()


class _Stochastic:
    """Mixed into a BatchNorm class: the training forward of StochNorm; evaluation is BatchNorm's."""

    batch_probability: float
    generator: torch.Generator
    ranks = ALONE  # whose rows count, see synchronise_statistics_

    def normalised(self: Any, x: Tensor) -> Tensor:
        if not self.training or self.running_mean is None:
            return F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.running_mean is None,
                0.0,
                self.eps,
            )
        dims = [d for d in range(x.ndim) if d != 1]
        # The moving statistics of before this batch; BatchNorm updates them on the way.
        moving_mean, moving_var = self.running_mean.clone(), self.running_var.clone()
        if self.ranks.world > 1:
            by_batch = batch_norm(self, x, self.ranks)
        else:
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)  # as torch's own layer counts
            by_batch = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
            )
        by_moving = F.batch_norm(x, moving_mean, moving_var, self.weight, self.bias, False, 0.0, self.eps)
        drawn = torch.rand(x.shape[1], generator=self.generator) < self.batch_probability
        if x.is_cuda:  # from pinned memory, so that nothing waits for the device
            drawn = drawn.pin_memory().to(x.device, non_blocking=True)
        shape = [1 if d in dims else -1 for d in range(x.ndim)]
        return torch.where(drawn.view(shape), by_batch, by_moving)


class StochNorm2d(_Stochastic, nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return self.normalised(input)


class StochNormAct2d(_Stochastic, timm.layers.BatchNormAct2d):  # type: ignore[name-defined]
    """timm's BatchNorm with the dropout and activation that follow it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self.normalised(x)))


class StochNorm1d(_Stochastic, nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return self.normalised(input)


_STOCHASTIC: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: StochNorm2d,
    nn.BatchNorm1d: StochNorm1d,
    timm.layers.BatchNormAct2d: StochNormAct2d,
}


def make_stochastic_(model: nn.Module, batch_probability: float, generator: torch.Generator) -> int:
    """Turns every BatchNorm of ``model`` into StochNorm, in place; weights, buffers and names stay.

    Args:
        model: any module.
        batch_probability: p, chance that a channel uses batch statistics in a step.
        generator: CPU generator of the draws, shared by all layers.

    Returns:
        How many layers; a BatchNorm of an unknown subclass is left as it is and not counted.
    """
    count = 0
    for layer in model.modules():
        stochastic = _STOCHASTIC.get(type(layer))
        if stochastic is not None:
            layer.__class__ = stochastic
            layer.batch_probability, layer.generator = batch_probability, generator  # type: ignore[assignment]
            count += 1
    return count
