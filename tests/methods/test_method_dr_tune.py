"""The acceptance tests of the DR-Tune specification that concern the method, not a single op."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from method_cases import at, context, make_batch, make_method, train_step, trained_parameters

from mooring.methods.dr_tune import DRTune


def ready(batches: int = 3, kind: str = "vit", **settings: object) -> DRTune:
    method = make_method("dr_tune", kind, **settings)
    assert isinstance(method, DRTune)
    method.setup(context([make_batch(8, 4, seed=s) for s in range(batches)]))
    return method.train()


def naive_loss(
    method: DRTune, features: torch.Tensor, labels: torch.Tensor, *, rotated: bool
) -> torch.Tensor:
    """Spec 1.4 and 1(c) with Python loops over classes, in float64, written without the ops."""
    weight = method.head.weight.detach().double()
    bias = method.head.bias.detach().double()
    bank = method.bank.view()
    keep = bank.labels >= 0
    p, d, y = bank["frozen"][keep].double(), bank["tuned"][keep].double(), bank.labels[keep]
    rotation = method.rotation.double() if rotated else torch.eye(p.shape[1], dtype=torch.float64)
    scale = features.detach().double().norm(dim=1).mean()
    rows = []
    for k in range(len(y)):
        mates = [j for j in range(len(y)) if y[j] == y[k]]
        mean = sum(p[j] for j in mates) / len(mates)
        prototype = weight[y[k]] / weight[y[k]].norm()
        confidence = torch.tensor([float(d[j] @ prototype) for j in mates], dtype=torch.float64).exp()
        target = sum(c * d[j] for c, j in zip(confidence / confidence.sum(), mates, strict=True))
        moved = rotation @ (p[k] - mean) + target
        rows.append(scale * moved / moved.norm().clamp_min(1e-12))
    logits = torch.cat([features.double(), torch.stack(rows)]) @ weight.T + bias
    return F.cross_entropy(logits, torch.cat([labels, y]))


@pytest.mark.parametrize("rotation", ["cached", "every_step", "skip", "off"])
def test_loss_equals_the_float64_loop(rotation: str) -> None:
    method = ready(rotation=rotation, rotation_period=2)
    optimizer = torch.optim.SGD(trained_parameters(method), lr=0.05)
    for step in range(3):  # move away from the warm-up state, where the rotation is the identity
        train_step(method, [make_batch(8, 4, seed=20 + step)], optimizer, at(step))
    where = at(3)
    method.before_step(where)
    batch = make_batch(8, 4, seed=40)
    with torch.no_grad():
        features = method.encoder(batch.images)
        out = method(batch, where)
    rotated = rotation in ("cached", "every_step")  # step 3 is no rotation step of period 2
    torch.testing.assert_close(
        out.loss.double(), naive_loss(method, features, batch.labels, rotated=rotated), rtol=2e-5, atol=2e-6
    )


def test_rotation_is_the_identity_after_warm_up_and_orthogonal_later() -> None:
    method = ready()
    method.before_step(at(0))
    eye = torch.eye(method.head.in_features)
    # outside the span of the bank the polar factor rests on the ridge alone, which divides fp32 rounding
    rounding = torch.finfo(torch.float32).eps / method.settings.rotation_ridge
    torch.testing.assert_close(method.rotation, eye, atol=rounding, rtol=0)
    optimizer = torch.optim.SGD(trained_parameters(method), lr=0.1)
    for step in range(5):
        train_step(method, [make_batch(8, 4, seed=30 + step)], optimizer, at(step))
    assert (method.rotation - eye).abs().max() > 1e-3  # it did move
    torch.testing.assert_close(method.rotation.T @ method.rotation, eye, atol=1e-5, rtol=0)


def test_cached_rotation_is_kept_between_refreshes() -> None:
    method = ready(rotation_period=3)
    optimizer = torch.optim.SGD(trained_parameters(method), lr=0.1)
    seen = []
    for step in range(7):
        train_step(method, [make_batch(8, 4, seed=30 + step)], optimizer, at(step))
        seen.append(method.rotation)
    assert [seen[i] is seen[i - 1] for i in range(1, 7)] == [True, True, False, True, True, False]


def test_warm_up_fills_at_most_k_rows_and_at_most_one_pass() -> None:
    assert len(ready(batches=2).bank) == 16  # K = 24, 16 images
    full = ready(batches=5)
    assert len(full.bank) == 24
    view = full.bank.view()
    assert torch.equal(view["frozen"], view["tuned"])
    assert view.ids.unique().numel() == 24


def test_gradients_reach_the_encoder_from_the_batch_alone() -> None:
    """Encoder gradient = that of the batch's mean cross-entropy times B / (B + n)."""
    method = ready()
    method.before_step(at(0))
    batch = make_batch(8, 4, seed=50)
    method(batch, at(0)).loss.backward()
    got = {n: p.grad.clone() for n, p in method.encoder.named_parameters()}
    method.zero_grad(set_to_none=True)
    F.cross_entropy(method.head(method.encoder(batch.images)), batch.labels).backward()
    share = 8 / (8 + len(method.bank))
    for name, p in method.encoder.named_parameters():
        torch.testing.assert_close(got[name], p.grad * share, rtol=1e-3, atol=1e-7)


def test_no_bank_is_plain_cross_entropy() -> None:
    method = make_method("dr_tune", "vit", bank_size=0)
    method.setup(context([make_batch(8, 4)]))
    batch = make_batch(8, 4, seed=1)
    method.before_step(at(0))
    out = method(batch, at(0))
    want = F.cross_entropy(method.head(method.encoder(batch.images)), batch.labels)
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-6)
    method.after_step([out], [batch], at(0))
    assert len(method.bank) == 0


def test_empty_bank_before_any_warm_up_is_plain_cross_entropy() -> None:
    method = make_method("dr_tune", "vit").train()
    batch = make_batch(8, 4, seed=1)
    method.before_step(at(0))
    want = F.cross_entropy(method.head(method.encoder(batch.images)), batch.labels)
    torch.testing.assert_close(method(batch, at(0)).loss, want, rtol=1e-5, atol=1e-6)


def test_mean_form_times_one_plus_ratio_is_equation_14() -> None:
    mean, paper = ready(), ready(loss_form="paper")
    batch = make_batch(8, 4, seed=60)
    losses = []
    for method in (mean, paper):
        method.before_step(at(0))
        losses.append(method(batch, at(0)).loss)
    torch.testing.assert_close(losses[0] * (1 + 24 / 8), losses[1], rtol=1e-5, atol=1e-6)


def test_the_current_batch_enters_the_bank_only_after_the_step() -> None:
    method = ready()
    method.before_step(at(0))
    before = method.bank.fingerprint()
    batch = make_batch(8, 4, seed=70)
    out = method(batch, at(0))
    out.loss.backward()
    assert torch.equal(method.bank.fingerprint(), before)
    method.after_step([out], [batch], at(0))
    assert set(batch.ids.tolist()) <= set(method.bank.view().ids.tolist())


def test_frozen_encoder_stays_frozen() -> None:
    method = ready(kind="cnn")
    frozen = copy.deepcopy(method.frozen_encoder.state_dict())
    optimizer = torch.optim.SGD(trained_parameters(method), lr=0.1)
    for step in range(3):
        train_step(method, [make_batch(8, 4, seed=step)], optimizer, at(step))
    assert not any(m.training for m in method.frozen_encoder.modules())
    assert all(
        torch.equal(a, b)
        for a, b in zip(frozen.values(), method.frozen_encoder.state_dict().values(), strict=True)
    )
    assert not any("frozen" in name for name, _ in method.named_parameters())


def test_bf16_autocast_keeps_the_rotation_orthogonal() -> None:
    method = ready(bank_dtype="bfloat16")
    optimizer = torch.optim.SGD(trained_parameters(method), lr=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for step in range(3):
            train_step(method, [make_batch(8, 4, seed=step)], optimizer, at(step))
    eye = torch.eye(method.head.in_features)
    torch.testing.assert_close(method.rotation.T @ method.rotation, eye, atol=1e-5, rtol=0)


def test_head_multiplier_is_one_plus_k_over_b_for_sgd() -> None:
    method = make_method("dr_tune", "cnn", bank_size=2048)
    assert method.head_lr_multiplier(64, "sgd") == 33
    assert method.head_lr_multiplier(64, "adamw") == make_method("fine_tune").head_lr_multiplier(64, "adamw")


def test_kept_rotated_rows_follow_the_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 C = 12 >= B + K / T = 8 + 24 / 6: rows R p_k are kept, renewed slot by slot and saved bit for bit."""
    method = ready(rotation_period=6)
    optimizer = torch.optim.SGD(trained_parameters(method), lr=0.05)
    for step in range(8):  # past a refresh and round the ring of 24 slots in batches of 5 rows
        train_step(method, [make_batch(5, 4, seed=20 + step)], optimizer, at(step))
        assert method._rotated is not None
        want = method.bank.view()["frozen"] @ method.rotation.T
        torch.testing.assert_close(method._rotated, want, rtol=0, atol=1e-6)
    where, batch = at(8), make_batch(8, 4, seed=40)
    method.before_step(where)
    with torch.no_grad():
        features = method.encoder(batch.images)
        loss = method(batch, where).loss
    expected = naive_loss(method, features, batch.labels, rotated=True)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=2e-6)

    again = make_method("dr_tune", "vit", rotation_period=6).train()
    again.load_state_dict(method.state_dict())
    again.load_extra_state(method.extra_state())
    with torch.no_grad():
        assert torch.equal(again(batch, where).loss, loss)
    monkeypatch.setattr(DRTune, "_keeps_rotated_rows", lambda self, rows: False)
    with torch.no_grad():
        torch.testing.assert_close(method(batch, where).loss, loss, rtol=1e-5, atol=1e-6)


def test_where_rotated_rows_are_kept() -> None:
    """Rotating the head wins when 3 C < B + K / T."""
    large = make_method("dr_tune", "vit", 200, bank_size=2048, rotation_period=10)
    small = make_method("dr_tune", "vit", 80, bank_size=2048, rotation_period=10)
    assert large._keeps_rotated_rows(64) and not small._keeps_rotated_rows(64)
    assert not make_method("dr_tune", "vit", 200, rotation="every_step")._keeps_rotated_rows(64)
