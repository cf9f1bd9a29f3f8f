"""BatchNorm while images of another domain pass through a network, and what is left of their pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batchnorm_layers(module: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm inside ``module``, in order."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def mixes_rows(module: nn.Module) -> bool:
    """Whether a BatchNorm inside would use the statistics of its batch, so that an image's features depend on
    which images lie beside it."""
    return any(layer.training or layer.running_mean is None for layer in batchnorm_layers(module))


def running_statistics(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Copies of all running means and variances of ``module``, [sum of channels] each; empty without BatchNorm."""
    layers = _tracking(module)
    if not layers:
        return torch.zeros(0), torch.zeros(0)
    means = [layer.running_mean for layer in layers if layer.running_mean is not None]
    variances = [layer.running_var for layer in layers if layer.running_var is not None]
    return torch.cat(means).clone(), torch.cat(variances).clone()


@contextmanager
def untracked(module: nn.Module) -> Iterator[None]:
    """Within it, BatchNorm in train mode uses batch statistics and leaves every buffer as it is.

    A momentum of 0 would not do: it counts batches, and spreads an infinity into the buffers.
    """
    layers = [layer for layer in batchnorm_layers(module) if layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


@contextmanager
def with_statistics(module: nn.Module, mean: Tensor, var: Tensor) -> Iterator[None]:
    """Within it, BatchNorm standardises by these statistics, as ``running_statistics`` gave them, in eval mode.

    The layers' own buffers are not touched; the affine weights are the layers' own.
    """
    layers = _tracking(module)
    widths = [layer.num_features for layer in layers]
    kept = [(layer.training, layer.running_mean, layer.running_var) for layer in layers]
    try:
        for layer, m, v in zip(layers, mean.split(widths), var.split(widths), strict=True):
            layer.training = False  # not train(False): what follows the layer (timm's dropout) keeps its mode
            layer._buffers["running_mean"], layer._buffers["running_var"] = m, v
        yield
    finally:
        for layer, (training, own_mean, own_var) in zip(layers, kept, strict=True):
            layer.training = training
            layer._buffers["running_mean"], layer._buffers["running_var"] = own_mean, own_var


def _tracking(module: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in batchnorm_layers(module) if layer.running_mean is not None]
