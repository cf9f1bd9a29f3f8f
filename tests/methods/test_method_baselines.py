"""The baselines against slow float64 definitions, written from the formulas and not from the methods."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from method_cases import at, context, make_batch, make_method
from torch import Tensor, nn

from mooring.config.baseline_settings import DELTASettings
from mooring.data.batch import Batch
from mooring.methods.base import Method
from mooring.methods.bss import smallest_squared_singular_values
from mooring.methods.registry import build_method
from mooring.models.groups import parameter_groups
from mooring.models.head import build_head
from mooring.models.stage_outputs import recorded_outputs, stage_modules
from mooring.models.stoch_norm import make_stochastic_
from mooring.models.torchvision_shim import import_timm


def term(method: Method, batch: Batch, name: str) -> Tensor:
    """One addition to the loss, weight included."""
    method.eval()  # no dropout, no batch statistics: the definitions below know neither
    return method(batch, at(0)).metrics[f"loss_{name}"]


def moved(method: Method) -> Method:
    """The method with encoder and head away from where they started."""
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in [*method.encoder.parameters(), *method.head.parameters()]:
            parameter += 0.02 * torch.randn(parameter.shape, generator=g)
    return method


@pytest.mark.parametrize(
    ("rows", "width", "count"), [(6, 20, 1), (6, 20, 3), (20, 6, 2), (5, 5, 5), (2, 9, 4)]
)
def test_bss_is_the_sum_of_the_smallest_squared_singular_values(rows: int, width: int, count: int) -> None:
    g = torch.Generator().manual_seed(2)
    features = torch.randn(rows + 2, width, generator=g, requires_grad=True)
    valid = torch.tensor([True] * rows + [False] * 2)
    got = smallest_squared_singular_values(features, valid, count)
    exact = features.detach()[:rows].double().requires_grad_()
    singular = torch.linalg.svdvals(exact).flip(0)[:count]
    wanted = singular.square().sum()
    torch.testing.assert_close(got.sum().double(), wanted.detach(), rtol=1e-4, atol=1e-4)
    got.sum().backward()
    wanted.backward()
    assert features.grad is not None and exact.grad is not None
    torch.testing.assert_close(features.grad[:rows].double(), exact.grad, rtol=1e-3, atol=1e-4)
    assert torch.equal(features.grad[rows:], torch.zeros(2, width))


def test_lwf_is_a_divergence_over_tempered_softmaxes() -> None:
    batch = make_batch(6, 4, seed=4, padded=2)
    method = moved(make_method("lwf"))
    got = term(method, batch, "lwf")
    with torch.no_grad():
        tuned, frozen = method.encoder(batch.images).double(), method.frozen_encoder(batch.images).double()
    weight, bias = method.source_head.weight.double(), method.source_head.bias.double()
    total = 0.0
    for i in range(4):
        p = ((weight @ frozen[i] + bias) / 3.0).softmax(0)
        q = ((weight @ tuned[i] + bias) / 3.0).softmax(0)
        total += sum(float(p[s]) * math.log(float(p[s]) / float(q[s])) for s in range(len(p)))
    assert float(got) == pytest.approx(4.0 * total / 4, rel=1e-3)
    assert all(p.grad is None and not p.requires_grad for p in method.source_head.parameters())


def test_feature_distillation_is_half_a_mean_squared_distance() -> None:
    batch = make_batch(6, 4, seed=4, padded=1)
    method = moved(make_method("feature_distillation", feature_pull=0.3, regressor="identity"))
    got = term(method, batch, "feature_distillation")
    with torch.no_grad():
        apart = method.encoder(batch.images).double() - method.frozen_encoder(batch.images).double()
    assert float(got) == pytest.approx(0.15 * float(apart[:5].square().sum()) / 5, rel=1e-4)


@pytest.mark.parametrize("name", ["co_tuning", "soft_fine_tuning"])
def test_a_source_head_that_learns_does_so_at_the_backbones_rate(name: str) -> None:
    method = make_method(name)
    roles = method.parameter_roles()
    groups = parameter_groups(method, roles, lr=0.1, head_lr_multiplier=10.0, weight_decay=0.0)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert isinstance(method.source_head, nn.Linear)
    assert {rates[id(p)] for p in method.source_head.parameters()} == {0.1}
    assert {rates[id(p)] for p in method.head.parameters()} == {1.0}


def test_co_tuning_relates_classes_by_the_mean_prediction() -> None:
    method = make_method("co_tuning", classes=5)
    batches = [make_batch(8, 4, seed=s, padded=s) for s in range(3)]  # class 4 has no images
    method.setup(context(batches))
    method.eval()
    for label in range(5):
        rows = []
        for batch in batches:
            with torch.no_grad():
                probability = method.source_head(method.encoder(batch.images)).double().softmax(1)
            rows += [p for p, y in zip(probability, batch.labels.tolist(), strict=True) if y == label]
        wanted = torch.stack(rows).mean(0) if rows else torch.full((6,), 1 / 6, dtype=torch.float64)
        torch.testing.assert_close(method.relationship[label].double(), wanted, rtol=1e-4, atol=1e-6)
    moved(method)
    got = term(method, batches[1], "co_tuning")
    with torch.no_grad():
        logs = method.source_head(method.encoder(batches[1].images)).double().log_softmax(1)
    labels = batches[1].labels.tolist()
    wanted = -sum(
        float((method.relationship[y].double() * row).sum())
        for y, row in zip(labels, logs, strict=True)
        if y >= 0
    )
    assert float(got) == pytest.approx(2.3 * wanted / 7, rel=1e-4)


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_feature_map_sums_squared_distances_of_stage_outputs(kind: str) -> None:
    batch = make_batch(4, 4, seed=4, padded=1)
    method = make_method("feature_map", kind, map_pull=0.02, head_pull=0.5)
    start = {name: p.clone() for name, p in method.encoder.state_dict().items()}
    moved(method)
    got = term(method, batch, "feature_map")
    stages = stage_modules(method.encoder)
    assert len(stages) == (4 if kind == "cnn" else 2)
    maps = []
    for weights in (dict(method.encoder.state_dict()), start):
        method.encoder.load_state_dict({k: v.clone() for k, v in weights.items()})
        with torch.no_grad(), recorded_outputs(method.encoder, stages) as outputs:
            method.encoder(batch.images)
        maps.append({name: value.double() for name, value in outputs.items()})
    distance = sum(float((maps[0][s][:3] - maps[1][s][:3]).square().sum()) for s in stages) / 3
    head = sum(float(p.detach().double().square().sum()) for p in method.head.parameters())
    assert float(got) == pytest.approx(0.01 * distance + 0.25 * head, rel=1e-3)


def test_delta_weighs_channels_and_its_two_attentions_rank_channels_alike() -> None:
    batches = [make_batch(6, 4, seed=s) for s in range(1)]
    found = {}
    for attention in ("taylor", "knock_out"):
        method = make_method("delta", attention=attention)
        for module in method.frozen_encoder.modules():
            if isinstance(
                module, nn.BatchNorm2d
            ):  # an untrained residual branch ends in zeros: no channel matters
                nn.init.ones_(module.weight)
        method.setup(context(batches))
        found[attention] = [getattr(method, f"attention_{j}") for j in range(len(method.stages))]
    for first, second in zip(*found.values(), strict=True):
        assert first.sum() == pytest.approx(1, abs=1e-5) and (first > 0).all()
        both = torch.stack([first, second]).log()
        assert torch.corrcoef(both)[0, 1] > 0.5
    method = moved(make_method("delta", map_pull=0.02, head_pull=0.0))
    method.setup(context(batches))
    got = term(method, batches[0], "delta")
    total = 0.0
    with torch.no_grad():
        with recorded_outputs(method.encoder, method.stages) as tuned:
            method.encoder(batches[0].images)
        with recorded_outputs(method.frozen_encoder.encoder, method.stages) as frozen:
            method.frozen_encoder(batches[0].images)
    for j, stage in enumerate(method.stages):
        apart = (tuned[stage].double() - frozen[stage].double()).square()
        for channel in range(apart.shape[1]):
            weight = float(getattr(method, f"attention_{j}")[channel])
            total += weight * apart.shape[1] * float(apart[:, channel].sum()) / apart[0, 0].numel()
    assert float(got) == pytest.approx(0.01 * total / 6, rel=1e-3)


def test_stoch_norm_draws_one_statistic_per_channel_and_always_moves() -> None:
    g = torch.Generator().manual_seed(3)
    layer = nn.BatchNorm2d(12)
    with torch.no_grad():
        layer.running_mean.normal_(generator=g)
        layer.running_var.uniform_(0.5, 2, generator=g)
        layer.weight.normal_(generator=g)
    mean, var = layer.running_mean.double().clone(), layer.running_var.double().clone()
    x = torch.randn(5, 12, 3, 3, generator=g) * 2 + 1
    drawn = torch.rand(12, generator=torch.Generator().manual_seed(9)) < 0.4
    assert make_stochastic_(layer, 0.4, torch.Generator().manual_seed(9)) == 1
    got = layer(x)
    moved_mean = 0.9 * mean + 0.1 * x.double().mean((0, 2, 3))
    for c in range(12):
        values = x[:, c].double()
        m, v = (values.mean(), values.var(correction=0)) if drawn[c] else (mean[c], var[c])
        wanted = (values - m) / math.sqrt(float(v) + layer.eps) * layer.weight[c].double()
        torch.testing.assert_close(got[:, c].detach().double(), wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.running_mean.double(), moved_mean)
    layer.eval()
    plain = F.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps
    )
    assert torch.equal(layer(x), plain)


def test_l2_sp_pulls_to_the_start_of_the_run_and_the_head_to_zero() -> None:
    method = make_method("l2_sp", backbone_pull=0.3, head_pull=0.7)
    start = {name: p.detach().clone() for name, p in method.encoder.named_parameters()}
    moved(method)
    got = term(method, make_batch(4, 4), "l2_sp")
    wanted = 0.15 * sum(
        float((p.detach().double() - start[name].double()).square().sum())
        for name, p in method.encoder.named_parameters()
    ) + 0.35 * sum(float(p.detach().double().square().sum()) for p in method.head.parameters())
    assert got.item() == pytest.approx(wanted, rel=1e-5)
    method.setup(
        context([make_batch(4, 4)])
    )  # a set-up anchors where the run starts: after a conversion, say
    head = 0.35 * sum(float(p.detach().double().square().sum()) for p in method.head.parameters())
    assert term(method, make_batch(4, 4), "l2_sp").item() == pytest.approx(head, rel=1e-5)


def test_delta_weighs_the_channels_of_a_model_with_channels_last() -> None:
    encoder = import_timm().create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=0,
        img_size=64,
        embed_dim=12,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 1, 1),
        window_size=2,
    )
    settings = DELTASettings(attention_batches=1)
    method = build_method(settings, encoder, build_head(encoder.num_features, 4))
    batch = make_batch(4, 4)
    batch = replace(batch, images=batch.images.repeat(1, 1, 2, 2))
    method.setup(context([batch]))
    widths = [12, 24, 48, 96]
    assert [method.get_buffer(f"attention_{i}").numel() for i in range(4)] == widths
    squares = torch.rand(2, 3, 5, widths[1])
    expected = widths[1] * (squares.mean((1, 2)) * method.get_buffer("attention_1")).sum(1)
    torch.testing.assert_close(method.weighted(squares, 1), expected)
