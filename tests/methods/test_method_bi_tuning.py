"""Bi-Tuning against a double loop in float64; its queue and its key network."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from method_cases import at, context, make_batch, make_method, train_step, trained_parameters
from torch import Tensor, nn

from mooring.config.contrast_settings import BiTuningSettings
from mooring.config.daft_settings import DAFTSettings
from mooring.config.method_settings import CombinedSettings
from mooring.methods.bi_tuning import BiTuning
from mooring.methods.forward import Forward
from mooring.methods.registry import build_method

T = 0.07


def trained(steps: int, kind: str = "vit", classes: int = 5, **changes: object) -> BiTuning:
    """A method whose queues hold the keys of that many steps on four of its classes."""
    method = make_method("bi_tuning", kind, classes, **changes)
    assert isinstance(method, BiTuning)
    batches = [make_batch(8, 4, seed=s, padded=s % 2) for s in range(steps)]
    method.setup(context(batches or [make_batch(8, 4)]))
    optimizer = torch.optim.SGD(trained_parameters(method), lr=0.02)
    for step, batch in enumerate(batches):
        train_step(method, [batch], optimizer, at(step))
    return method


def unit(row: Tensor) -> Tensor:
    return row / row.square().sum().sqrt()


def naive(query: Tensor, own: Tensor, queued: list[tuple[Tensor, int]], label: int) -> Tensor:
    """LSE over all keys minus the mean over the positives, minus log of their number."""
    scores = [query @ own / T] + [query @ key / T for key, _ in queued]
    positive = [0] + [1 + j for j, (_, of) in enumerate(queued) if of == label]
    mean = sum(scores[j] for j in positive) / len(positive)
    return torch.stack(scores).logsumexp(0) - mean - math.log(len(positive))


@pytest.mark.parametrize("steps", [1, 4])  # queues with empty slots; full ones that went round
def test_both_contrasts_equal_a_double_loop_in_float64(steps: int) -> None:
    method = trained(steps, image_contrast=0.7, class_contrast=0.3, queue_rows=4)
    batch = make_batch(7, 4, seed=50, padded=2)
    run = Forward(method, batch)
    run.features.retain_grad()
    terms = method.additions(run, at(9))
    sum(terms.values()).backward()

    features = run.features.detach().double().requires_grad_()
    weight, bias = (p.detach().double() for p in (method.projector.weight, method.projector.bias))
    rows = torch.cat([method.head.weight, method.head.bias[:, None]], 1).detach().double()
    view = method.queue.view()
    slots = [j for j, label in enumerate(view.labels.tolist()) if label >= 0]
    queued = {name: [(view[name][j].double(), int(view.labels[j])) for j in slots] for name in ("z", "h")}
    with torch.no_grad():
        key_features = method.key["encoder"](batch.views["view1"])
        own_keys = method.key["projector"](key_features).double()
    losses = {"image_contrast": torch.zeros(()).double(), "class_contrast": torch.zeros(()).double()}
    for i, label in enumerate(batch.labels.tolist()):
        if label < 0:
            continue
        z = unit(weight @ features[i] + bias)
        losses["image_contrast"] += 0.7 * naive(z, unit(own_keys[i]), queued["z"], label) / 5
        h = unit(torch.cat([features[i], torch.ones(1).double()]))
        losses["class_contrast"] += 0.3 * naive(unit(rows[label]), h, queued["h"], label) / 5
    for name, loss in losses.items():
        torch.testing.assert_close(terms[name].detach().double(), loss.detach(), rtol=1e-5, atol=1e-6)
    sum(losses.values()).backward()
    assert features.grad is not None and run.features.grad is not None
    scale = float(features.grad.abs().max())
    torch.testing.assert_close(run.features.grad.double(), features.grad, rtol=1e-4, atol=1e-5 * scale)
    assert method.head.weight.grad is None  # only by value


def test_the_batch_is_no_key_of_its_own_before_it_is_queued() -> None:
    method = trained(0)
    batches = [make_batch(8, 4, seed=s) for s in (3, 4)]
    method.before_step(at(0))
    outputs = [method(batch, at(0)) for batch in batches]
    for output in outputs:  # both micro-batches see the queue of before the step: it is empty
        assert float(output.metrics["loss_image_contrast"]) == 0
        assert float(output.metrics["loss_class_contrast"]) == 0
    assert len(method.queue) == 0
    method.after_step(outputs, batches, at(0))
    per_class = [int(n) for n in torch.bincount(torch.cat([b.labels for b in batches]), minlength=5)]
    view = method.queue.view()
    assert (view.labels.view(5, 4) >= 0).sum(1).tolist() == [min(4, n) for n in per_class]
    queued = set(view.ids.tolist()) - {-1}
    assert queued <= set(torch.cat([b.ids for b in batches]).tolist())
    assert float(method(batches[0], at(1)).metrics["loss_class_contrast"]) > 0


@pytest.mark.parametrize("momentum", [0.999, 0.5, 1.0])
def test_key_network_follows_in_fp32_and_its_statistics_go_their_own_way(momentum: float) -> None:
    method = trained(0, "cnn", key_momentum=momentum)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in [*method.encoder.parameters(), *method.projector.parameters()]:
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    pairs = [
        (own, followed)
        for name, network in (("encoder", method.encoder), ("projector", method.projector))
        for own, followed in zip(method.key[name].parameters(), network.parameters(), strict=True)
    ]
    before = [own.detach().double() for own, _ in pairs]
    method.train()
    method.before_step(at(0))
    for (own, followed), start in zip(pairs, before, strict=True):
        assert own.dtype == torch.float32 and not own.requires_grad
        wanted = momentum * start + (1 - momentum) * followed.detach().double()
        # three roundings to fp32 of numbers no larger than these
        assert ((own.double() - wanted).abs() <= 3 * 2**-24 * (start.abs() + followed.abs())).all()
        assert momentum != 1 or torch.equal(own.double(), start)
    held = [own.clone() for own, _ in pairs]
    norm = next(m for m in method.key["encoder"].modules() if isinstance(m, nn.BatchNorm2d))
    query_norm = next(m for m in method.encoder.modules() if isinstance(m, nn.BatchNorm2d))
    batch = make_batch(8, 4)
    seen = replace(batch, views={"view1": batch.images * 2 + 1})
    start = norm.running_mean.clone()
    method(seen, at(0)).loss.backward()
    assert not torch.equal(norm.running_mean, start)
    assert not torch.allclose(norm.running_mean, query_norm.running_mean)
    assert all(torch.equal(own, h) and own.grad is None for (own, _), h in zip(pairs, held, strict=True))
    names = {name for name, _ in method.named_parameters()}
    assert not any("key" in name for name in names)


def test_key_network_takes_the_modes_of_the_encoder() -> None:
    method = trained(0, "cnn")
    method.train()
    frozen = next(m for m in method.encoder.modules() if isinstance(m, nn.BatchNorm2d))
    own = next(m for m in method.key["encoder"].modules() if isinstance(m, nn.BatchNorm2d))
    frozen.eval()  # as train.batchnorm=frozen
    start = own.running_mean.clone()
    method(make_batch(8, 4), at(0))
    assert not own.training and torch.equal(own.running_mean, start)


def test_a_missing_view_and_another_queue_are_refused() -> None:
    method = trained(1)
    with pytest.raises(ValueError, match="view1"):
        method(replace(make_batch(4, 4), views={}), at(0))
    with pytest.raises(ValueError, match="resume with the same settings"):
        make_method("bi_tuning", "vit", 5, queue_rows=7).load_extra_state(method.extra_state())


def test_the_projector_learns_at_the_rate_of_the_backbone() -> None:
    method = make_method("bi_tuning")
    roles = method.parameter_roles()
    assert all(any(p is q for q in roles["backbone"]) for p in method.projector.parameters())
    assert roles["auxiliary"] == []


def test_beside_daft_keys_start_from_the_converted_encoder() -> None:
    single = make_method("bi_tuning")
    parts = (DAFTSettings(), BiTuningSettings(queue_rows=4))
    method = build_method(CombinedSettings(parts=parts), single.encoder, single.head)
    batches = [make_batch(8, 4, seed=s) for s in range(2)]
    before = {name: value.clone() for name, value in method.encoder.state_dict().items()}
    method.setup(context(batches))
    key = method.parts["bi_tuning"].key["encoder"].state_dict()
    converted = method.encoder.state_dict()
    assert any(not torch.equal(converted[name], before[name]) for name in before)
    assert all(torch.equal(key[name], converted[name]) for name in converted)
    optimizer = torch.optim.SGD(trained_parameters(method), lr=0.01)
    for step, batch in enumerate(batches):  # DAFT's head starts at zero: its rows have no direction
        assert math.isfinite(train_step(method, [batch], optimizer, at(step)))
