"""TeS: acceptance tests of its specification that concern the method (the loss itself: tests/kernels)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from method_cases import at, context, make_batch, make_method

from mooring.methods.tes import MaskedBatchNorm


def test_without_weights_it_is_cross_entropy() -> None:
    batch = make_batch(8, 4, seed=1)
    tes, plain = make_method("tes", lambda_v=0.0, lambda_t=0.0), make_method("fine_tune")
    tes.load_state_dict(plain.state_dict(), strict=False)
    losses = [method.train()(batch, at(0)).loss for method in (tes, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(tes.head.weight.grad, plain.head.weight.grad)
    assert torch.equal(tes.projection.project.weight.grad, torch.zeros_like(tes.projection.project.weight))


@pytest.mark.parametrize("reference", ["instance", "class"])
def test_equals_the_formula_row_by_row(reference: str) -> None:
    method = make_method("tes", reference=reference, lambda_v=0.3, lambda_t=0.7, tau=0.1)
    batch = make_batch(6, 4, seed=2, padded=1)
    with torch.no_grad():
        method.head.weight.normal_(generator=torch.Generator().manual_seed(3))
    method.eval()
    got = method(batch, at(0)).loss
    with torch.no_grad():
        features = method.encoder(batch.images)
        logits, text = method.head(features).double(), method.text.double()
        units = (
            F.normalize(method.projection(features, batch.labels >= 0), dim=1).double()
            if reference == "instance"
            else None
        )
    total = 0.0
    for i in range(5):
        label = int(batch.labels[i])
        cosines = text @ (text[label] if units is None else units[i])
        r = (cosines / 0.1).softmax(0)
        target = 0.3 * r + 0.7 * F.one_hot(torch.tensor(label), 4)
        assert float(target.sum()) == pytest.approx(1)
        total -= float((target * logits[i].log_softmax(0)).sum())
        if units is not None:
            total -= 0.7 * float((cosines / 0.1).log_softmax(0)[label])
    assert got.item() == pytest.approx(total / 5, rel=1e-4)


def test_the_text_has_no_gradient_and_the_target_sends_none_into_the_projection() -> None:
    method = make_method("tes", lambda_v=0.5, lambda_t=0.0).train()
    method(make_batch(8, 4, seed=1), at(0)).loss.backward()
    assert not method.text.requires_grad
    assert all(p.grad is None or not p.grad.any() for p in method.projection.parameters())
    assert "text" not in method.state_dict() and method.parameter_roles()["auxiliary"]


def test_the_order_of_classes_does_not_matter() -> None:
    order = torch.tensor([2, 0, 3, 1])
    first, second = make_method("tes"), make_method("tes")
    batch = make_batch(8, 4, seed=1)
    with torch.no_grad():
        second.text.copy_(first.text[order])
        second.head.weight.copy_(first.head.weight[order])
        second.head.bias.copy_(first.head.bias[order])
    renamed = replace(batch, labels=order.argsort()[batch.labels])
    torch.testing.assert_close(first.train()(batch, at(0)).loss, second.train()(renamed, at(0)).loss)


def test_mixed_images_take_their_soft_labels() -> None:
    method = make_method("tes", reference="class").eval()
    batch = make_batch(6, 4, seed=2)
    hard = method(batch, at(0)).loss
    soft = method(replace(batch, targets=F.one_hot(batch.labels, 4).float()), at(0)).loss
    torch.testing.assert_close(hard, soft)


def test_lambda_v_can_rise_over_the_run() -> None:
    method, plain = make_method("tes", lambda_v=0.5, lambda_v_ramp=0.5), make_method("tes", lambda_v=0.0)
    steady = make_method("tes", lambda_v=0.5)
    batch = make_batch(8, 4, seed=1)
    losses = {}
    for name, m, step in [
        ("start", method, 0),
        ("plain", plain, 0),
        ("end", method, 10),
        ("steady", steady, 10),
    ]:
        losses[name] = m.eval()(batch, at(step)).loss
    torch.testing.assert_close(losses["start"], losses["plain"])
    torch.testing.assert_close(losses["end"], losses["steady"])


def test_the_norm_of_the_projection_ignores_padding_and_takes_a_single_row() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(7, 5, generator=g)
    masked, plain = MaskedBatchNorm(5), torch.nn.BatchNorm1d(5)
    valid = torch.tensor([True] * 5 + [False] * 2)
    torch.testing.assert_close(masked(x, valid)[:5], plain(x[:5]))
    torch.testing.assert_close(masked.running_mean, plain.running_mean)
    torch.testing.assert_close(masked.running_var, plain.running_var)
    assert torch.isfinite(masked(x[:1], torch.tensor([True]))).all()
    before = masked.running_mean.clone()
    assert torch.isfinite(masked(x, torch.zeros(7, dtype=torch.bool))).all()
    assert torch.equal(masked.running_mean, before)


def test_combines_with_dr_tune_targets_for_the_batch_and_hard_labels_for_the_bank() -> None:
    from mooring.config.method_settings import CombinedSettings, DRTuneSettings
    from mooring.config.tes_settings import TeSSettings
    from mooring.methods.registry import build_method

    parts = (DRTuneSettings(bank_size=12), TeSSettings(projection_width=16))
    single = make_method("tes")
    method = build_method(
        CombinedSettings(parts=parts), single.encoder, single.head, resources=single.resources
    )
    warm = [make_batch(8, 4, seed=s) for s in range(3)]
    method.setup(context(warm))
    batch = make_batch(8, 4, seed=7)
    method.eval()
    out = method(batch, at(0))
    tes, dr = method.parts["tes"], method.parts["dr_tune"]
    from mooring.methods.forward import Forward

    run = Forward(method, batch)
    alone = tes.classification(run, at(0))
    # the bank's part of the loss alone: what DR-Tune adds to a batch loss of zero
    bank = dr.widened(torch.zeros(()), run, at(0))
    torch.testing.assert_close(out.loss, (8 * alone) / 20 + bank)
    assert set(out.push) == {"dr_tune.frozen", "dr_tune.tuned"}
    before = len(dr.bank)
    method.after_step([out], [batch], at(0))
    assert len(dr.bank) == before == 12
    state = method.extra_state()
    assert set(state) == {"dr_tune", "tes"}
    method.load_extra_state(state)
    names = [name for name, _ in method.named_parameters()]
    assert len(names) == len(set(names)) and not any(".encoder." in name for name in names)
