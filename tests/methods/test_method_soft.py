"""Soft Fine-tuning: acceptance tests of its specification, against definitions written from its formulas."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from method_cases import (
    SOURCE_CLASSES,
    at,
    make_batch,
    make_method,
    make_source_rows,
    train_step,
    trained_parameters,
)
from torch import nn

from mooring.config.baseline_settings import FeatureMapSettings
from mooring.config.method_settings import CombinedSettings
from mooring.config.soft_settings import SoftFineTuningSettings
from mooring.errors import ConfigError
from mooring.methods.base import At, Resources
from mooring.methods.combined import Combined
from mooring.methods.registry import build_method
from mooring.methods.soft_schedule import source_batch_rows, source_weight
from mooring.models.batchnorm import freeze_statistics
from mooring.models.groups import parameter_groups
from mooring.models.head import build_head

STEPS = 40


def weights(**settings: object) -> list[float]:
    table = SoftFineTuningSettings.model_validate(settings)
    return [source_weight(table, at(step, steps=STEPS)) for step in range(STEPS + 1)]


SCHEDULES = {
    "linear": lambda tau: 1 - tau,
    "cosine": lambda tau: (1 + math.cos(math.pi * tau)) / 2,
    "poly": lambda tau: (1 - tau) ** 3,
    "exp": lambda tau: (math.exp(-5 * tau) - math.exp(-5)) / (1 - math.exp(-5)),
    "step": lambda tau: float(tau < 0.25),
    "constant": lambda tau: 1.0,
    "zero": lambda tau: 0.0,
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_schedules_are_the_formulas_and_meet_their_ends(name: str, fraction: float) -> None:
    got = weights(soft_schedule=name, soft_fraction=fraction, w0=0.7, soft_power=3.0, soft_until=0.25)
    taus = [min(1.0, step / (fraction * STEPS)) for step in range(STEPS + 1)]
    assert got == pytest.approx([0.7 * SCHEDULES[name](tau) for tau in taus], abs=1e-12)
    assert got[0] == (0 if name == "zero" else pytest.approx(0.7))
    after = got[math.ceil(fraction * STEPS) :]
    assert after == [0.7 if name == "constant" else 0.0] * len(after)
    assert all(a >= b for a, b in pairwise(got))


def test_by_epochs_the_last_one_has_no_source_loss() -> None:
    table = SoftFineTuningSettings(soft_granularity="epoch")

    def weight(epoch: int, epochs: int) -> float:
        where = At(step=epoch * 10 + 3, epoch=epoch, steps_per_epoch=10, total_steps=10 * epochs)
        return source_weight(table, where)

    assert [weight(e, 5) for e in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert weight(0, 1) == 1


@pytest.mark.parametrize(("weight", "rows"), [(1, 50), (0.99, 50), (0.8, 40), (0.5, 32), (1e-9, 8), (0, 0)])
def test_rows_of_a_shrinking_batch(weight: float, rows: int) -> None:
    table = SoftFineTuningSettings()
    assert source_batch_rows(table, weight, 50) == rows
    whole = table.model_copy(update={"source_shrink": False})
    assert source_batch_rows(whole, weight, 50) == (50 if weight else 0)
    assert source_batch_rows(table, 3.0, 50) == 50


def train(method: nn.Module, steps: int = 3, lr: float = 0.05) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(trained_parameters(method), lr=lr, momentum=0.9, weight_decay=0.01)
    for step in range(steps):
        train_step(method, [make_batch(8, 4, seed=step)], optimizer, at(step))
    return method.state_dict()


def test_zero_is_plain_fine_tuning_bit_for_bit() -> None:
    plain = train(make_method("fine_tune"))
    zero = make_method("soft_fine_tuning", soft_schedule="zero")
    first = {k: v.clone() for k, v in zero.source_head.state_dict().items()}
    soft = train(zero)
    for name, value in plain.items():
        assert torch.equal(value, soft[name]), name
    assert all(torch.equal(v, zero.source_head.state_dict()[k]) for k, v in first.items())
    assert zero.source_rows(at(0)) == 0
    assert not type(zero).needs_of(zero.settings).source_stream


def test_frozen_statistics_leave_the_running_buffers_of_plain_fine_tuning() -> None:
    plain = train(make_method("fine_tune"), lr=0.0)
    for policy, equal in (("frozen_stats", True), ("eval", True), ("shared", False), ("joint", False)):
        soft = train(make_method("soft_fine_tuning", source_bn=policy), lr=0.0)
        buffers = [name for name in plain if "running" in name or "num_batches" in name]
        assert len(buffers) > 20
        assert all(torch.equal(plain[name], soft[name]) for name in buffers) is equal


def gradients(method: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    method.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_constant_is_joint_training(kind: str) -> None:
    """Loss and gradients are those of both losses on one batch of both data sets."""
    method = make_method(
        "soft_fine_tuning", kind, soft_schedule="constant", w0=0.6, source_bn="joint"
    ).train()
    batch = make_batch(8, 4, seed=3)
    encoder = copy.deepcopy(method.encoder)
    out = method(batch, at(13))
    got = gradients(method, out.loss)
    features = encoder(torch.cat([batch.images, batch.source.images])).double()
    target, source = (copy.deepcopy(h).double() for h in (method.head, method.source_head))
    loss = F.cross_entropy(target(features[:8]), batch.labels)
    loss = loss + 0.6 * F.cross_entropy(source(features[8:]), batch.source.labels)
    whole = nn.ModuleDict({"encoder": encoder, "head": target, "source_head": source})
    want = gradients(whole, loss)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=1e-7)
    assert set(got) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value.double(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("policy", ["frozen_stats", "eval", "shared"])
def test_what_batchnorm_does_with_source_images(policy: str) -> None:
    method = make_method("soft_fine_tuning", source_bn=policy)
    first = copy.deepcopy(method.encoder)
    train(method, 2)
    batch = replace(make_batch(8, 4, seed=7), source=make_source_rows(24, seed=7))
    other = copy.deepcopy(method.encoder).train()
    with torch.no_grad():
        other(batch.images)
        if policy == "eval":
            buffers = dict(first.named_buffers())
            for name, buffer in other.named_buffers():
                buffer.copy_(buffers[name])
            other.eval()
        features = other(batch.source.images)
        want = F.cross_entropy(method.source_head(features), batch.source.labels)
    before = {name: b.clone() for name, b in method.encoder.named_buffers()}
    out = method.train()(batch, at(0))
    torch.testing.assert_close(out.metrics["loss_source"], want, rtol=1e-5, atol=1e-6)
    if policy == "shared":  # target first, source last
        for (name, a), b in zip(method.encoder.named_buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)
    assert any(not torch.equal(b, before[name]) for name, b in method.encoder.named_buffers())
    assert all(m.training for m in method.encoder.modules())


def test_a_batch_that_has_shrunk_below_sixteen_uses_the_first_statistics() -> None:
    losses = []
    for policy in ("frozen_stats", "eval"):
        method = make_method("soft_fine_tuning", source_bn=policy, source_batch_size=32)
        train(method, 1)
        batch = replace(make_batch(8, 4, seed=7), source=make_source_rows(8, seed=7))
        losses.append(method.train()(batch, at(18)).metrics["loss_source"])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_shrunken_batch_is_the_full_one_on_average() -> None:
    """Over all 24 windows of 8 rows of a ring each row is drawn as often as any other."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh())
    resources = Resources(source_head=nn.Linear(5, 3))
    method = build_method(
        SoftFineTuningSettings(source_batch_size=24), encoder, build_head(5, 4), resources=resources
    )
    g = torch.Generator().manual_seed(1)
    target = make_batch(4, 4)
    target = replace(target, images=torch.randn(4, 3, 2, 2, generator=g))
    images, labels = torch.randn(24, 3, 2, 2, generator=g), torch.randint(0, 3, (24,), generator=g)

    def gradient(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        source = replace(target, images=images[rows], labels=labels[rows], ids=rows, source=None)
        return gradients(method, method(replace(target, source=source), at(14)).loss)

    assert method.source_rows(at(14)) == 8  # ceil(0.3 * 24)
    assert method.source_rows(at(13)) == 16
    windows = [gradient((torch.arange(8) + start) % 24) for start in range(24)]
    for name, want in gradient(torch.arange(24)).items():
        mean = torch.stack([window[name] for window in windows]).mean(0)
        torch.testing.assert_close(mean, want, rtol=1e-4, atol=1e-6)


def count_forwards(module: nn.Module) -> list[int]:
    rows: list[int] = []
    module.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape[0]))
    return rows


def test_at_weight_zero_nothing_of_the_source_is_run_or_moved() -> None:
    method = make_method("soft_fine_tuning", soft_fraction=0.5)
    optimizer = torch.optim.AdamW(trained_parameters(method), lr=1e-3, weight_decay=0.1)
    train_step(method, [make_batch(8, 4)], optimizer, at(0))
    before = method.source_head.weight.clone()
    rows = count_forwards(method.encoder)
    assert method.source_rows(at(10)) == 0 < method.source_rows(at(9))
    train_step(method, [make_batch(8, 4)], optimizer, at(10))  # though there are source images in the batch
    assert rows == [8]
    assert torch.equal(method.source_head.weight, before)


def test_one_forward_serves_both_where_rows_do_not_see_each_other() -> None:
    losses = []
    for freeze in (True, False):
        method = make_method("soft_fine_tuning", source_bn="eval")
        if freeze:
            freeze_statistics(method.encoder)
        rows = count_forwards(method.encoder)
        out = method.train(freeze)(make_batch(8, 4), at(3))
        losses.append(out.loss.detach())
        assert rows == [16]
    torch.testing.assert_close(*losses)
    vit = make_method("soft_fine_tuning", "vit").train()
    rows = count_forwards(vit.encoder)
    vit(make_batch(8, 4), at(3))
    assert rows == [16]
    cnn = make_method("soft_fine_tuning").train()
    rows = count_forwards(cnn.encoder)
    cnn(make_batch(8, 4), at(3))
    assert rows == [8, 8]


def test_distillation_needs_no_source_images_and_starts_at_zero() -> None:
    method = make_method("soft_fine_tuning", "vit", source="distill", distillation_temperature=2.0)
    needs = type(method).needs_of(method.settings)
    assert needs.frozen_encoder and needs.source_head and not needs.source_stream
    batch = replace(make_batch(8, 4, seed=2, padded=2), source=None)
    first_encoder, first_head = copy.deepcopy(method.encoder), copy.deepcopy(method.source_head)
    assert method.source_rows(at(0)) == 0
    assert method(batch, at(0)).metrics["loss_source"] < 1e-6
    optimizer = torch.optim.SGD(trained_parameters(method), lr=0.1)
    for step in range(2):
        train_step(method, [replace(make_batch(8, 4, seed=step), source=None)], optimizer, at(step))
    assert not torch.equal(method.source_head.weight, first_head.weight)
    method.eval()
    got = method(batch, at(5)).metrics["loss_source"]
    with torch.no_grad():
        now = method.source_head(method.encoder(batch.images)).double() / 2
        then = first_head(first_encoder.eval()(batch.images)).double() / 2
    p, q = then.softmax(1), now.softmax(1)
    rows = (p * (p.log() - q.log())).sum(1)
    assert got.item() == pytest.approx(0.75 * rows[:6].mean().item(), rel=1e-3)
    rows_seen = count_forwards(method.frozen_encoder)
    method(batch, at(20))
    assert rows_seen == []


@pytest.mark.parametrize("mixed", [False, True])
def test_the_target_may_have_the_other_share(mixed: bool) -> None:
    batch = make_batch(8, 4, seed=2, padded=1)
    if mixed:
        batch = replace(
            batch, targets=F.one_hot(batch.labels.clamp_min(0), 4).float() * (batch.labels >= 0)[:, None]
        )
    one = make_method("soft_fine_tuning", "vit", w0=0.8).eval()
    both = make_method("soft_fine_tuning", "vit", w0=0.8, target_weight="complement").eval()
    for m in (one, both):
        torch.nn.init.normal_(m.head.weight, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        target = F.cross_entropy(one.head(one.encoder(batch.images))[:7].double(), batch.labels[:7]).item()
        source = F.cross_entropy(
            one.source_head(one.encoder(batch.source.images)).double(), batch.source.labels
        ).item()
    weight = 0.8 * 0.75
    assert one(batch, at(5)).loss.item() == pytest.approx(target + weight * source, rel=1e-5)
    got = both(batch, at(5)).loss.item()
    assert got == pytest.approx((1 - weight) * target + weight * source, rel=1e-5)


def test_the_source_head_learns_at_the_backbones_rate() -> None:
    method = make_method("soft_fine_tuning")
    groups = parameter_groups(
        method, method.parameter_roles(), lr=1e-3, head_lr_multiplier=10, layer_decay=0.5
    )
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rate[id(method.source_head.weight)] == 1e-3
    assert rate[id(method.head.weight)] == pytest.approx(1e-2)
    assert method.parameter_roles()["auxiliary"] == []


def test_beside_another_method_each_sees_its_own_rows() -> None:
    """Hooks of a further part read the target rows only, though one forward carries both."""
    soft = make_method("soft_fine_tuning", "vit")
    anchored = make_method("feature_map", "vit", map_pull=0.1)
    anchored.load_state_dict(soft.state_dict(), strict=False)
    with torch.no_grad():  # away from the start, so that the anchor pulls
        for module in (soft, anchored):
            for p in module.encoder.parameters():
                p.mul_(1.05)
    batch = make_batch(8, 4, seed=1)
    want = soft(batch, at(4)).loss + anchored(batch, at(4)).loss - make_plain_loss(soft, batch)
    settings = CombinedSettings(
        parts=(SoftFineTuningSettings(source_batch_size=8), FeatureMapSettings(map_pull=0.1))
    )
    both = Combined(
        soft.encoder,
        soft.head,
        settings,
        parts=[soft, rebuilt_on(soft, anchored)],
        resources=soft.resources,
    )
    rows = count_forwards(both.encoder)
    out = both(batch, at(4))
    assert rows == [16]
    torch.testing.assert_close(out.loss, want, rtol=1e-4, atol=1e-5)
    assert set(both.parameter_roles()["backbone"]) >= set(soft.source_head.parameters())
    assert both.source_rows(at(0)) == 8


def make_plain_loss(method: nn.Module, batch: object) -> torch.Tensor:
    return F.cross_entropy(method.head(method.encoder(batch.images)), batch.labels)


def rebuilt_on(soft: nn.Module, anchored: nn.Module) -> nn.Module:
    """The other method around the same encoder and head."""
    anchored.encoder, anchored.head = soft.encoder, soft.head
    return anchored


def test_beside_daft_source_images_keep_the_first_statistics() -> None:
    auto = make_method("soft_fine_tuning")
    auto.joined(frozenset({"daft"}))
    assert auto._policy == "eval"
    with pytest.raises(ConfigError, match="source_bn=eval"):
        make_method("soft_fine_tuning", source_bn="shared").joined(frozenset({"daft"}))
    make_method("soft_fine_tuning", source_bn="shared").joined(frozenset({"concept_tuning"}))


def test_missing_parts_are_named() -> None:
    method = make_method("soft_fine_tuning")
    with pytest.raises(ValueError, match=r"Batch\.source"):
        method(replace(make_batch(8, 4), source=None), at(0))
    assert method.source_head.out_features == SOURCE_CLASSES
    with pytest.raises(ValueError, match="w0 <= 1"):
        SoftFineTuningSettings(target_weight="complement", w0=1.5)
    with pytest.raises(ValueError, match="leave source_data out"):
        SoftFineTuningSettings.model_validate({"source": "distill", "source_data": "somewhere"})
    with pytest.raises(ValueError, match="empty text"):
        SoftFineTuningSettings.model_validate({"source_data": " "})
