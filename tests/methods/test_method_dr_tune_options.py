"""DR-Tune's named variants, each against its own float64 definition or its own cadence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_cases import at, context, make_batch, make_method, train_step, trained_parameters

from mooring.methods.base import At
from mooring.methods.dr_tune import DRTune


def moved(steps: int = 3, **settings: object) -> DRTune:
    """A DR-Tune whose tuned features have drifted from the frozen ones."""
    method = make_method("dr_tune", "vit", **settings)
    assert isinstance(method, DRTune)
    method.setup(context([make_batch(8, 4, seed=s) for s in range(3)]))
    optimizer = torch.optim.SGD(trained_parameters(method), lr=0.05)
    for step in range(steps):
        train_step(method, [make_batch(8, 4, seed=20 + step)], optimizer, at(step))
    return method.train()


def in_epochs(step: int, length: int) -> At:
    return At(step=step, epoch=step // length, steps_per_epoch=length, total_steps=10 * length)


def test_skip_rotates_at_the_public_codes_steps() -> None:
    """Every 10th batch of an epoch: with 15 batches that is 0, 10, 15, 25, 30; the cached form counts through."""
    skip = make_method("dr_tune", "vit", rotation="skip", rotation_period=10)
    assert [s for s in range(31) if skip._rotates(in_epochs(s, 15))] == [0, 10, 15, 25, 30]
    cached = make_method("dr_tune", "vit", rotation="cached", rotation_period=10)
    assert [s for s in range(31) if cached._phase(in_epochs(s, 15)) == 0] == [0, 10, 20, 30]


def test_skip_applies_the_rotation_on_a_rotating_step_only() -> None:
    method = moved(rotation="skip", rotation_period=2)
    method.before_step(at(4))
    assert method.rotation is not None
    batch = make_batch(8, 4, seed=40)
    rotating, resting = (method(batch, at(step)).loss.item() for step in (4, 5))
    method.rotation = None  # what step 5 must not have looked at
    assert method(batch, at(4)).loss.item() == resting
    assert rotating != resting


def test_without_translation_the_rotated_bank_keeps_its_own_class_means() -> None:
    """Rotation-only ablation: v = R (p - mean P) + mean Q, then unit length times s."""
    method = moved(translation=False)
    method.before_step(at(3))
    batch = make_batch(8, 4, seed=41)
    with torch.no_grad():
        features = method.encoder(batch.images)
        loss = method(batch, at(3)).loss
    bank = method.bank.view()
    p, q = bank["frozen"].double(), bank["tuned"].double()
    v = (p - p.mean(0)) @ method.rotation.double().T + q.mean(0)
    v = features.double().norm(dim=1).mean() * F.normalize(v, eps=1e-12)
    logits = torch.cat([features.double(), v]) @ method.head.weight.double().T + method.head.bias.double()
    want = F.cross_entropy(logits, torch.cat([batch.labels, bank.labels]))
    torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=2e-6)


def test_the_papers_calibration_equals_its_equations() -> None:
    """Raw rows, softmax over the class of W_c . d, v = R p + mu_d - R mu_p, no rescaling; loops in float64."""
    method = moved(calibration="paper")
    method.before_step(at(3))
    batch = make_batch(8, 4, seed=44)
    with torch.no_grad():
        features = method.encoder(batch.images)
        loss = method(batch, at(3)).loss
    bank, weight = method.bank.view(), method.head.weight.detach().double()
    p, d, y = bank["frozen"].double(), bank["tuned"].double(), bank.labels
    assert (p.norm(dim=1) - 1).abs().min() > 0.1  # the rows are raw
    rotated = p @ method.rotation.double().T
    rows = []
    for k in range(len(y)):
        mates = (y == y[k]).nonzero().flatten()
        share = torch.softmax(d[mates] @ weight[y[k]], 0)
        rows.append(rotated[k] + share @ d[mates] - rotated[mates].mean(0))
    logits = torch.cat([features.double(), torch.stack(rows)]) @ weight.T + method.head.bias.double()
    torch.testing.assert_close(
        loss.double(), F.cross_entropy(logits, torch.cat([batch.labels, y])), rtol=2e-5, atol=2e-6
    )


def test_label_smoothing_reaches_bank_rows() -> None:
    """With every batch row masked, what is left is the smoothed loss of the bank alone."""
    method = moved()
    method.label_smoothing = 0.2
    method.before_step(at(3))
    batch = make_batch(8, 4, seed=42)
    masked = type(batch)(batch.images, torch.full_like(batch.labels, -1), batch.ids)
    smoothed = method(masked, at(3)).loss
    method.label_smoothing = 0.0
    plain = method(masked, at(3)).loss
    assert smoothed > plain + 1e-4 or smoothed < plain - 1e-4


@pytest.mark.parametrize("solver", ["newton", "polar"])
@pytest.mark.parametrize("changes", [{"rotation_ridge": 0.0}, {"rotation_det_fix": True}])
def test_polar_without_a_ridge_is_refused_with_the_settings(changes: dict, solver: Any) -> None:
    from mooring.config.method_settings import DRTuneSettings

    with pytest.raises(ValueError, match="take rotation_solver=svd"):
        DRTuneSettings(rotation_solver=solver, **changes)


def test_labels_beyond_the_classes_are_refused_before_they_enter_the_bank() -> None:
    method = moved()
    batch = make_batch(8, 4, seed=43)
    batch.labels[0] = 4
    method.before_step(at(3))
    with pytest.raises(RuntimeError, match=r"labels must be -1 \(padding\) or 0\.\.3"):
        method(batch, at(3))


def test_a_state_of_another_pretrained_encoder_is_refused() -> None:
    one, two = moved(), moved()
    with torch.no_grad():
        next(two.frozen_encoder.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="pretrained weights differ"):
        two.load_extra_state(one.extra_state())


def test_a_broken_off_set_up_is_done_again_from_the_start() -> None:
    method = make_method("dr_tune", "vit")
    batches = [make_batch(8, 4, seed=s) for s in range(3)]
    method.setup(context(batches[:1]))
    method.setup(context(batches))
    assert len(method.bank) == 24 and method.bank.view().ids.unique().numel() == 24
