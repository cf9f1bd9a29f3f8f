"""BatchNorm conversion (DAFT): measure the target data's statistics, adopt them, keep the function.

    statistics = collect_statistics(encoder, batches).reduce(group)
    convert_(encoder, statistics)

Convert before the model is wrapped (DDP, FSDP, ZeRO), before an optimizer, an average or an anchor takes a copy of
its parameters, and once per run: a resumed run holds the converted layers already.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mooring.collectives import all_reduce_
from mooring.distributed import ALONE, Ranks
from mooring.errors import MooringError
from mooring.models.batchnorm_sync import SynchronisedNorm1d, SynchronisedNorm2d, SynchronisedNormAct2d
from mooring.models.torchvision_shim import import_timm
from mooring_kernels import batchnorm_statistics, convert_batchnorm_

timm = import_timm()

# Exact types whose forward is known: BatchNorm, then what they hold (dropout, activation). Any other subclass runs
# its own forward and is only listened to.
_PLAIN = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SynchronisedNorm1d, SynchronisedNorm2d,
)  # fmt: skip
_WITH_ACTIVATION = (timm.layers.BatchNormAct2d, timm.layers.SyncBatchNormAct, SynchronisedNormAct2d)
_POWER_ITERATIONS = 50
OUTLIER_RATIO = 1e3  # a weight that changes by more than this factor belongs to a channel that was dead


class ConversionError(MooringError):
    """Statistics that cannot be used for this encoder."""


@dataclass(frozen=True)
class Statistics:
    """Sums over the calls of each BatchNorm layer, in float64; ``mean`` and ``var`` divide them.

    Attributes:
        layers: channels by layer name, every layer that keeps running statistics.
        first, second: [sum C_l]. Mean of batches: sums of m_b and of s_b. Pooled: with n values a channel, d = m_b -
            running mean, sums of n d and of (n - 1) s_b + n d^2.
        weight: [layers], what they are divided by: calls, or values.
        shift: [sum C_l], what ``first`` is relative to: 0, or the running means.
        pooled: which of the two.
        second_moment: sum of f f^T over images, [D, D]; None: the encoder returned no [B, D] tensor.
        images: [], number of images behind ``second_moment``.
    """

    layers: dict[str, int]
    first: Tensor
    second: Tensor
    weight: Tensor
    shift: Tensor
    pooled: bool
    second_moment: Tensor | None
    images: Tensor

    def reduce(self, ranks: Ranks | None = None) -> Statistics:
        """The sums over all ranks (None: those of the process group), by one all-reduce; of one rank, unchanged."""
        ranks = ranks or Ranks.here()
        if ranks.world == 1:
            return self
        parts = [self.first, self.second, self.weight, self.images.reshape(1)]
        if self.second_moment is not None:
            parts.append(self.second_moment.flatten())
        joined = torch.cat(parts)
        all_reduce_(joined, ranks, "feature statistics")
        first, second, weight, images, *rest = joined.split([part.numel() for part in parts])
        moment = rest[0].view_as(self.second_moment) if self.second_moment is not None else None
        return replace(
            self, first=first, second=second, weight=weight, second_moment=moment, images=images[0]
        )

    @property
    def called(self) -> list[str]:
        """Layers that ran at least once."""
        return [name for name, weight in zip(self.layers, self.weight.tolist(), strict=True) if weight > 0]

    def mean_and_var(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Per layer that ran: mu_T [C] and v_T [C], float64."""
        sizes = list(self.layers.values())
        parts = (part.split(sizes) for part in (self.first, self.second, self.shift))
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, weight, first, second, shift in zip(self.layers, self.weight.tolist(), *parts, strict=True):
            if weight == 0:
                continue
            mean = first / weight
            if self.pooled:
                var = (second - weight * mean.square()).clamp_min(0) / max(weight - 1, 1)
            else:
                var = second / weight
            found[name] = (shift + mean, var)
        return found

    @property
    def lambda_max(self) -> float | None:
        """Largest eigenvalue of E[f f^T] over the images, by power iteration; None without features."""
        if self.second_moment is None:
            return None
        matrix = self.second_moment / self.images
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(len(matrix), generator=generator, dtype=torch.float64).to(matrix.device)
        for _ in range(_POWER_ITERATIONS):
            vector = matrix @ (vector / vector.norm().clamp_min(1e-300))
        return vector.norm().item()

    @property
    def auto_head_lr(self) -> float | None:
        """3 / lambda_max: well inside what heavy-ball with momentum 0.9 allows on a softmax head."""
        return self._over_lambda(3.0)

    @property
    def largest_head_lr(self) -> float | None:
        """7.6 / lambda_max: above it, heavy-ball with momentum 0.9 on a softmax head is not known to be stable."""
        return self._over_lambda(7.6)

    def _over_lambda(self, numerator: float) -> float | None:
        largest = self.lambda_max
        return None if largest is None else numerator / largest if largest > 0 else math.inf


def _tracking_layers(encoder: nn.Module) -> dict[str, _BatchNorm]:
    return {
        name: layer
        for name, layer in encoder.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
    }


@dataclass
class _Sums:
    """Running sums of one layer; ``second`` and ``first`` as in ``Statistics``."""

    layer: _BatchNorm
    pooled: bool
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)
    shift: Tensor = field(init=False)
    weight: int = 0

    def __post_init__(self) -> None:
        assert self.layer.running_mean is not None
        mean = self.layer.running_mean.double()
        self.first, self.second = torch.zeros_like(mean), torch.zeros_like(mean)
        self.shift = mean.clone() if self.pooled else torch.zeros_like(mean)

    def normalise(self, x: Tensor) -> Tensor:
        """The layer's BatchNorm of x in eval mode; the batch's statistics go into the sums."""
        layer = self.layer
        assert layer.running_mean is not None and layer.running_var is not None
        y, mean, var = batchnorm_statistics(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps
        )
        values, mean, var = self._of_all_ranks(x.numel() // x.shape[1], mean, var)
        distance = mean.double() - self.shift
        if self.pooled:
            self.first += values * distance
            self.second += (values - 1) * var.double() + values * distance.square()
            self.weight += values
        else:
            self.first += distance
            self.second += var
            self.weight += 1
        return y

    def _of_all_ranks(self, values: int, mean: Tensor, var: Tensor) -> tuple[int, Tensor, Tensor]:
        """Number of values, mean and unbiased variance of the batch that this one is a part of, where the layer
        synchronises its statistics."""
        ranks = getattr(self.layer, "ranks", ALONE)
        if ranks.world == 1:
            return values, mean, var
        mean, var = mean.double(), var.double()
        squares = (values - 1) * var + values * mean.square()
        sums = torch.cat([mean.new_tensor([values]), values * mean, squares])
        total, first, second = all_reduce_(sums, ranks, "batch statistics").split([1, len(mean), len(mean)])
        mean = first / total
        return int(total), mean, ((second - total * mean.square()) / (total - 1).clamp_min(1)).clamp_min(0)


@contextmanager
def _measured(sums: Iterable[_Sums]) -> Iterator[None]:
    """Within it the layers' forwards feed ``sums``. The model is not copied and is afterwards as it was."""
    with ExitStack() as stack:
        for own in sums:
            layer = own.layer
            if type(layer) in _PLAIN + _WITH_ACTIVATION and "forward" not in layer.__dict__:
                layer.__dict__["forward"] = _replacement(own)
                stack.callback(layer.__dict__.pop, "forward")
            else:
                handle = layer.register_forward_pre_hook(_listener(own))
                stack.callback(handle.remove)
        yield


def _replacement(sums: _Sums) -> Any:
    after: list[nn.Module] = []
    if type(sums.layer) in _WITH_ACTIVATION:
        after = [child for child in sums.layer.children() if not isinstance(child, nn.Identity)]

    def forward(x: Tensor) -> Tensor:
        y = sums.normalise(x)
        for module in after:
            y = module(y)
        return y

    return forward


def _listener(sums: _Sums) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums.normalise(inputs[0])

    return hook


@contextmanager
def _in_eval_mode(encoder: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in encoder.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def collect_statistics(
    encoder: nn.Module,
    batches: Iterable[Tensor],
    *,
    max_images: int | None = None,
    pooled: bool = False,
    ranks: Ranks = ALONE,
) -> Statistics:
    """What train-mode BatchNorm would see on these batches, for all layers in one pass.

    The encoder runs in eval mode with the statistics it has, so no layer disturbs another; it is neither copied
    nor changed. Each call of a layer on a batch gives a mean m_b and an unbiased variance s_b per channel;
    ``mu_T = mean of m_b``, ``v_T = mean of s_b``, unweighted over calls, a short last batch included. So v_T is the
    variance within a batch, without the spread of batch means: use the batch size of the training.

    Args:
        encoder: maps [B, 3, H, W] to features [B, D].
        batches: images [B, 3, H, W] on the encoder's device, augmented as in training, without padding rows.
        max_images: stop after the batch that reaches this many; None: all. A channel's mean is off by about its
            spread between images over sqrt(max_images): 4096 images give 1.6 %.
        pooled: variance over all values at once in place of the mean of variances.
        ranks: those that bring images; each has the statistics of its own, to be reduced. Layers that synchronise
            their statistics count a batch of all ranks as one.

    Raises:
        ConversionError: there is no batch.

    Source: arXiv 2308.07728; batch means unweighted and training augmentation as in the public code.
    """
    layers = _tracking_layers(encoder)
    sums = [_Sums(layer, pooled) for layer in layers.values()]
    moment: Tensor | None = None
    seen = counted = 0
    with _in_eval_mode(encoder), _measured(sums):
        for images in batches:
            features = encoder(images)
            seen += len(images) * ranks.world
            if isinstance(features, Tensor) and features.dim() == 2:
                rows = features.float()
                with torch.autocast(rows.device.type, enabled=False):
                    product = (rows.T @ rows).double()
                moment = product if moment is None else moment.add_(product)
                counted += len(rows)
            if max_images is not None and seen >= max_images:
                break
    if seen == 0:
        raise ConversionError("collect_statistics: expected at least one batch of images; got none")
    device = moment.device if moment is not None else sums[0].first.device if sums else torch.device("cpu")
    empty = torch.zeros(0, dtype=torch.float64, device=device)
    return Statistics(
        layers={name: layer.num_features for name, layer in layers.items()},
        first=torch.cat([empty, *(own.first for own in sums)]),
        second=torch.cat([empty, *(own.second for own in sums)]),
        weight=torch.tensor([own.weight for own in sums], dtype=torch.float64, device=device),
        shift=torch.cat([empty, *(own.shift for own in sums)]),
        pooled=pooled,
        second_moment=moment,
        images=torch.tensor(counted, dtype=torch.float64, device=device),
    )


@dataclass(frozen=True)
class Conversion:
    """What ``convert_`` did.

    Attributes:
        converted: names of the layers.
        skipped: name -> why.
        outliers: name -> channels whose weight changed by more than ``OUTLIER_RATIO``, up or down.
        note: one sentence for the log.
    """

    converted: tuple[str, ...]
    skipped: dict[str, str]
    outliers: dict[str, list[int]]
    note: str


@torch.no_grad()
def convert_(encoder: nn.Module, statistics: Statistics, *, max_ratio: float = math.inf) -> Conversion:
    """Gives every BatchNorm layer the statistics and keeps the encoder's eval-mode function, in place.

    All layers at once: each keeps its output, so the order does not matter. A layer without weight or bias gets
    them first (1 and 0). Layers without running statistics have nothing to convert; one that never ran is skipped
    with a warning. A second call with the same statistics changes nothing.

    Args:
        encoder: the one the statistics come from; plain parameters, float32.
        statistics: reduced over the ranks already.
        max_ratio: as in ``mooring_kernels.convert_batchnorm_``.

    Raises:
        ConversionError: the statistics are of another encoder, or not finite.
        TypeError: a layer is not float32.
    """
    layers = _tracking_layers(encoder)
    sizes = {name: layer.num_features for name, layer in layers.items()}
    if sizes != statistics.layers:
        other = sorted(set(sizes.items()) ^ set(statistics.layers.items()))[:3]
        raise ConversionError(f"convert_: expected statistics of this encoder; got others, first in {other}")
    skipped = {
        name: "keeps no running statistics"
        for name, layer in encoder.named_modules()
        if isinstance(layer, _BatchNorm) and name not in layers
    }
    targets = statistics.mean_and_var()
    for name in layers.keys() - targets.keys():
        skipped[name] = "never ran in the statistics pass"
        warnings.warn(f"BatchNorm {name} never ran in the statistics pass: not converted", stacklevel=2)
    for name, (mean, var) in targets.items():
        if not (mean.isfinite().all() and var.isfinite().all()):
            raise ConversionError(f"convert_: the statistics of {name} must be finite; got NaN or infinity")
    if not targets:
        return Conversion((), skipped, {}, "no BatchNorm layer to convert: the encoder is unchanged")

    chosen = [layers[name] for name in targets]
    for layer in chosen:
        _give_affine(layer)
    means, variances = zip(*targets.values(), strict=True)
    ratios = convert_batchnorm_(
        [layer.weight for layer in chosen],
        [layer.bias for layer in chosen],
        [_buffer(layer.running_mean) for layer in chosen],
        [_buffer(layer.running_var) for layer in chosen],
        means,
        variances,
        [layer.eps for layer in chosen],
        max_ratio=max_ratio,
    )
    outliers = {
        name: channels
        for name, ratio in zip(targets, ratios, strict=True)
        if (channels := ((ratio > OUTLIER_RATIO) | (ratio < 1 / OUTLIER_RATIO)).nonzero().flatten().tolist())
    }
    note = f"converted {len(chosen)} BatchNorm layers, {len(skipped)} skipped, outliers in {len(outliers)}"
    return Conversion(tuple(targets), skipped, outliers, note)


def give_affine_(encoder: nn.Module) -> None:
    """Gives every layer that can be converted a weight and a bias (1 and 0) where it has none, in place.

    ``convert_`` does it too; do it earlier where something takes the list of parameters before.
    """
    for layer in _tracking_layers(encoder).values():
        _give_affine(layer)


def _buffer(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _give_affine(layer: _BatchNorm) -> None:
    mean = _buffer(layer.running_mean)
    if layer.weight is None:
        layer.weight = nn.Parameter(torch.ones_like(mean))
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros_like(mean))
    layer.affine = True
