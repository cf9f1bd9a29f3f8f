"""The front-door head against its formulas, written out image by image in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mooring.models.any_size import any_image_size
from mooring.models.front_door import (
    FrontDoorHead,
    FrontDoorOutput,
    bottleneck_divergence,
    joined,
    save_front_door,
    with_front_door,
)
from mooring.models.torchvision_shim import import_timm


def head_with_gains(fusion: str) -> FrontDoorHead:
    torch.manual_seed(0)
    head = FrontDoorHead(16, 5, 6, fusion)
    nn.init.constant_(head.position_gain, 0.7)
    nn.init.constant_(head.channel_gain, -0.4)
    return head


def written_out(head: FrontDoorHead, x: Tensor, noise: Tensor) -> Tensor:
    """Logits of one map X [D, N], in float64."""

    def conv(layer: nn.Linear, x: Tensor) -> Tensor:
        return layer.weight @ x + layer.bias[:, None]

    q, k, v = (conv(layer, x) for layer in (head.queries, head.keys, head.values))
    position = head.position_gain * v @ (q.T @ k).softmax(1).T + x
    energy = x @ x.T
    shares = (energy.max(1, keepdim=True).values - energy).softmax(1)
    channel = head.channel_gain * shares @ x + x
    if head.fusion == "sum":
        pooled = (position + channel).mean(1)
    else:
        pooled = torch.cat([position.mean(1), channel.mean(1)])
    mean, rho = head.mediator(pooled).split(head.bottleneck)
    return head.classifier(mean + (1 + (rho - 5).exp()).log() * noise)


@pytest.mark.parametrize("fusion", ["sum", "concat_mlp"])
def test_equals_the_formulas_image_by_image(fusion: str) -> None:
    head = head_with_gains(fusion)
    g = torch.Generator().manual_seed(1)
    maps, noise = torch.randn(3, 16, 2, 3, generator=g), torch.randn(3, 6, generator=g)
    got = head(maps, noise).logits
    exact = copy.deepcopy(head).double()
    want = [written_out(exact, x.flatten(1), e) for x, e in zip(maps.double(), noise.double(), strict=True)]
    # 16-wide products of values about 1 in fp32, twice through a softmax
    torch.testing.assert_close(got.double(), torch.stack(want), rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())


def test_without_gains_the_sum_is_twice_the_pooled_map() -> None:
    torch.manual_seed(0)
    head, maps = FrontDoorHead(16, 5, 6), torch.randn(2, 16, 3, 3)
    torch.testing.assert_close(head(maps).mean, head.mediator(2 * maps.mean((2, 3))).chunk(2, 1)[0])


@pytest.mark.parametrize("form", ["code", "vib"])
def test_divergence_is_that_of_two_gaussians(form: str) -> None:
    g = torch.Generator().manual_seed(2)
    output = FrontDoorOutput(
        torch.empty(0), torch.randn(4, 3, generator=g), 5 + torch.randn(4, 3, generator=g)
    )
    got = bottleneck_divergence(output, torch.tensor([True, True, True, False]), form)
    sigma = (1 + (output.rho.double() - 5).exp()).log()
    normal = torch.distributions.Normal
    found = normal(output.mean.double(), sigma.exp() if form == "code" else sigma)
    want = torch.distributions.kl_divergence(found, normal(0.0, 1.0))[:3].sum(1).mean()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_divergence_and_its_gradient_stay_finite_without_any_noise() -> None:
    for rho in (-300.0, -20.0, 80.0):
        inner = torch.full((1, 2), rho, requires_grad=True)
        output = FrontDoorOutput(torch.empty(0), torch.zeros(1, 2), inner)
        value = bottleneck_divergence(output, torch.tensor([True]), "vib")
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(inner.grad).all()


def test_average_is_of_log_probabilities() -> None:
    g = torch.Generator().manual_seed(3)
    one, two = torch.randn(2, 4, 5, generator=g)
    torch.testing.assert_close(
        joined(one, two, "avg").softmax(1),
        (one.softmax(1) * two.softmax(1)).sqrt()
        / (one.softmax(1) * two.softmax(1)).sqrt().sum(1, keepdim=True),
    )
    assert joined(one, two, "cls") is one and joined(one, two, "fd") is two


def test_a_saved_head_predicts_beside_the_model(tmp_path: Path) -> None:
    timm = import_timm()
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5).eval()
    head = FrontDoorHead(512, 5, 8, "concat_mlp").eval()
    described = save_front_door(tmp_path / "model", head, "fd")
    loaded = with_front_door(model, tmp_path / "model", described).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), head(model.forward_features(images)).logits)
    assert with_front_door(model, tmp_path / "model", {"method": "concept_tuning"}) is model


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_a_vit_takes_another_size_with_interpolated_positions(name: str) -> None:
    timm = import_timm()
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, depth=1, num_classes=0).eval()
    dynamic = timm.create_model(name, img_size=64, depth=1, num_classes=0, dynamic_img_size=True).eval()
    dynamic.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        with any_image_size(model):
            assert torch.equal(model(images), dynamic(images))
        with pytest.raises(AssertionError):
            model(images)
        full = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(model(full), dynamic(full))
