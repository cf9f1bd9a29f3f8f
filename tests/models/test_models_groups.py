from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from mooring.models.encoder import build_encoder
from mooring.models.groups import parameter_groups
from mooring.models.head import build_head

NAMES = [
    "test_resnet",
    "test_vit",
    "test_efficientnet",
    "test_convnext",
    "test_byobnet",
    "swin_tiny_patch4_window7_224",
]


class Net(nn.Module):
    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.queue_projection = nn.Linear(4, 4)

    def roles(self) -> dict[str, list[nn.Parameter]]:
        parts = {"backbone": self.encoder, "head": self.head, "auxiliary": self.queue_projection}
        return {role: [p for p in part.parameters() if p.requires_grad] for role, part in parts.items()}


def build(name: str, num_classes: int = 5) -> Net:
    size = 64 if name.startswith("swin") else None
    encoder = build_encoder(name, weights="none", image_size=size)
    return Net(encoder, build_head(encoder.feature_dim, num_classes))


def by_parameter(groups: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {id(p): group for group in groups for p in group["params"]}


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("name", NAMES)
def test_every_trainable_parameter_exactly_once(name: str, layer_decay: float | None) -> None:
    net = build(name)
    groups = parameter_groups(net, net.roles(), lr=0.1, weight_decay=0.05, layer_decay=layer_decay)
    counted = Counter(id(p) for group in groups for p in group["params"])
    assert counted == Counter(id(p) for p in net.parameters())
    assert len({g["name"] for g in groups}) == len(groups)
    for group in groups:
        assert set(group) == {"params", "lr", "weight_decay", "role", "name"}
        assert group["role"] in group["name"]
    torch.optim.SGD(groups)  # torch refuses duplicates itself


def test_rates_and_decay_by_role() -> None:
    net = build("test_resnet")
    groups = parameter_groups(
        net, net.roles(), lr=0.1, head_lr_multiplier=33, auxiliary_lr_multiplier=2, weight_decay=0.05
    )
    rates = {"backbone": 0.1, "head": 3.3, "auxiliary": 0.2}
    found = by_parameter(groups)
    for role, parameters in net.roles().items():
        for p in parameters:
            group = found[id(p)]
            assert group["role"] == role and group["lr"] == pytest.approx(rates[role], rel=1e-12)
            assert group["weight_decay"] == (0.05 if p.ndim > 1 else 0.0)
    assert [g["name"] for g in groups][:2] == ["backbone/decay", "backbone/no_decay"]


def test_decay_everywhere_where_asked() -> None:
    net = build("test_vit")
    groups = parameter_groups(net, net.roles(), lr=0.1, weight_decay=0.05, decay_norm_and_bias=True)
    assert all(group["weight_decay"] == 0.05 for group in groups) and len(groups) == 3


def test_what_the_model_excludes_from_decay_is_excluded() -> None:
    net = build("test_vit")
    found = by_parameter(parameter_groups(net, net.roles(), lr=0.1, weight_decay=0.05))
    model = net.encoder.model
    assert model.pos_embed.ndim > 1 and found[id(model.pos_embed)]["weight_decay"] == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_is_timms_own(name: str) -> None:
    """Scales equal those timm gives the same architecture with its classifier in place."""
    import timm
    from timm.optim import param_groups_layer_decay

    net = build(name)
    found = by_parameter(parameter_groups(net, net.roles(), lr=1.0, layer_decay=0.5))
    ours = {n: found[id(p)]["lr"] for n, p in net.encoder.model.named_parameters()}
    whole = timm.create_model(name, num_classes=5, **net.encoder.model_args)
    names = {id(p): n for n, p in whole.named_parameters()}
    theirs = {
        names[id(p)]: group["lr_scale"]
        for group in param_groups_layer_decay(whole, layer_decay=0.5)
        for p in group["params"]
    }
    assert ours == {n: scale for n, scale in theirs.items() if n in ours}
    assert len(set(ours.values())) > 2


def test_layer_decay_of_a_model_without_a_grouping_goes_by_children() -> None:
    plain = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net = Net(plain, nn.Linear(3, 2))
    found = by_parameter(parameter_groups(net, net.roles(), lr=1.0, head_lr_multiplier=1.0, layer_decay=0.5))
    assert [found[id(m.weight)]["lr"] for m in (plain[0], plain[2], net.head)] == [0.25, 0.5, 1.0]


def test_a_frozen_encoder_gives_no_backbone_group() -> None:
    net = build("test_resnet")
    net.encoder.requires_grad_(False)
    groups = parameter_groups(net, net.roles(), lr=0.1, layer_decay=0.7)
    assert {g["role"] for g in groups} == {"head", "auxiliary"}


def test_a_parameter_without_role_or_with_two_is_our_own_mistake() -> None:
    net = build("test_resnet")
    roles = net.roles()
    with pytest.raises(AssertionError, match="without a role: queue_projection"):
        parameter_groups(net, {k: v for k, v in roles.items() if k != "auxiliary"}, lr=0.1)
    with pytest.raises(AssertionError, match=r"head\.weight is in the roles"):
        parameter_groups(net, {**roles, "auxiliary": [*roles["auxiliary"], net.head.weight]}, lr=0.1)
