from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mooring.models.batchnorm import (
    fold_batchnorm,
    freeze_statistics,
    frozen_copy,
    parameter_count,
    unfreeze_statistics,
)
from mooring.models.encoder import build_encoder


def norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


@torch.no_grad()
def with_random_statistics(module: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine weights as training leaves them: nothing is 0 or 1, some scales are negative."""
    generator = torch.Generator().manual_seed(seed)
    for norm in norms(module):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) * 0.3)
        norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.3)
        norm.weight.copy_(torch.randn(norm.num_features, generator=generator) * 0.3 + 1)
        norm.bias.copy_(torch.randn(norm.num_features, generator=generator) * 0.1)
    return module


def small_net() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5), nn.BatchNorm1d(5)
    )
    return with_random_statistics(net)


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_frozen_statistics_survive_train_at_every_level() -> None:
    net = small_net()
    parent = nn.Sequential(net, nn.BatchNorm1d(5))
    before = copy.deepcopy(net.state_dict())
    assert freeze_statistics(net) == 2
    for again in (parent.train, net.train, net[1].train, lambda: copy.deepcopy(parent).train()):
        again()
        parent(images(4, 3, 8, 8))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert parent[1].training and net[3].training and not any(n.training for n in norms(net))


def test_a_deep_copy_keeps_its_own_layers_frozen() -> None:
    net = small_net()
    freeze_statistics(net)
    duplicate = copy.deepcopy(net).train()
    assert not any(n.training for n in norms(duplicate))
    unfreeze_statistics(duplicate)
    assert all(n.training for n in norms(duplicate)) and not any(n.training for n in norms(net.train()))


def test_frozen_statistics_still_train_the_affine_weights() -> None:
    net = small_net()
    freeze_statistics(net)
    net.train()(images(4, 3, 8, 8)).sum().backward()
    assert all(n.weight.grad is not None and n.weight.requires_grad for n in norms(net))


def test_frozen_copy_is_apart_from_the_original() -> None:
    encoder = build_encoder("test_resnet", weights="none")
    with_random_statistics(encoder)
    encoder.train()
    state = copy.deepcopy(encoder.state_dict())
    frozen = frozen_copy(encoder)
    holder = nn.Module()
    holder.inner = frozen
    holder.train()
    assert encoder.training and not any(m.training for m in frozen.modules())
    x = images(2, 3, 64, 64)
    features = frozen(x)
    assert not features.requires_grad and not features.is_inference()
    assert torch.equal(features, frozen(x)) and not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())
    with torch.no_grad():
        for p in encoder.parameters():
            p.zero_()
    assert torch.equal(features, frozen(x))


# every pair folds in these; in the others some BatchNorm has no convolution of its own before it
FOLDABLE = {
    "test_resnet": True,
    "test_efficientnet": True,
    "mobilenetv2_100": True,
    "densenet121": False,
    "resnetv2_50": False,
}


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_is_the_same_function_in_float64(name: str) -> None:
    """In float64 the algebra must hold to a few hundred rounding errors of the depth of the network."""
    torch.manual_seed(0)  # the weights are drawn
    encoder = with_random_statistics(build_encoder(name, weights="none", image_size=64)).double().eval()
    frozen = frozen_copy(encoder, example=images(1, 3, 64, 64, dtype=torch.float64))
    left = len(norms(frozen))
    assert frozen.folded > 0 and left == len(norms(encoder)) - frozen.folded
    assert (left == 0) == FOLDABLE[name]
    x = images(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = encoder(x)
    error = (frozen(x) - expected).abs().max() / expected.abs().max()
    assert error < 1e3 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_adds_no_more_than_fp32_rounding(name: str) -> None:
    """Against float64, the folded fp32 network may be at most 4 times as wrong as the unfolded one."""
    encoder = with_random_statistics(build_encoder(name, weights="none", image_size=64)).eval()
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        exact = copy.deepcopy(encoder).double()(x.double())
        plain = (encoder(x) - exact).abs().max()
        folded = (frozen_copy(encoder, example=x)(x) - exact).abs().max()
    assert folded <= 4 * plain + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


class Branch(nn.Module):
    """The convolution's output is read by its BatchNorm and by something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (self.norm(y) + y.relu()).mean((2, 3))


class Twice(Branch):
    """The same pair runs on two inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.conv(x)) + self.norm(self.conv(x * 2))).mean((2, 3))


class Between(Branch):
    """Something acts between the two."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).relu()).mean((2, 3))


class Shared(Branch):
    """Another convolution uses the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 4, 3)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.conv(x)) + self.other(x)).mean((2, 3))


class Standardised(nn.Conv2d):
    """Its forward undoes a change of scale of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


class OfStandardised(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Standardised(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).mean((2, 3))


class Parametrised(OfStandardised):
    """The weight is computed from other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize("kind", [Branch, Twice, Between, Shared, OfStandardised, Parametrised])
def test_what_must_not_be_folded_is_left_alone(kind: type[nn.Module]) -> None:
    net = with_random_statistics(kind()).eval()
    x = images(2, 3, 8, 8)
    with torch.no_grad():
        expected = net(x)
        assert fold_batchnorm(net, x) == 0
        assert torch.equal(net(x), expected)


def test_without_an_example_nothing_is_folded() -> None:
    frozen = frozen_copy(small_net())
    assert frozen.folded == 0 and len(norms(frozen)) == 2
    assert frozen_copy(small_net(), example=images(1, 3, 8, 8)).folded == 1


@pytest.mark.assets
def test_folding_with_real_statistics(assets: Path) -> None:
    file = assets / "weights" / "tf_efficientnet_lite0.in1k.fp16.safetensors"
    encoder = build_encoder("tf_efficientnet_lite0", weights=file, image_size=128).eval()
    frozen = frozen_copy(encoder)
    assert frozen.folded == 49 and not norms(frozen)
    x = images(4, 3, 128, 128)
    with torch.no_grad():
        exact = copy.deepcopy(encoder).double()(x.double())
        plain, folded = (encoder(x) - exact).abs().max(), (frozen(x) - exact).abs().max()
    assert folded <= 4 * plain


def test_parameter_count_counts_shared_parameters_once() -> None:
    net = Shared()
    assert parameter_count(net) == 4 * 3 * 9 + 4 + 4 + 4 + 4
    net.norm.requires_grad_(False)
    assert parameter_count(net, trainable_only=True) == 4 * 3 * 9 + 4 + 4
