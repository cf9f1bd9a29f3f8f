"""Core-tuning against double loops in float64, corrected and as released."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from method_cases import at, context, make_batch, make_method, train_step, trained_parameters
from torch import Tensor

from mooring.config.daft_settings import DAFTSettings
from mooring.config.method_settings import CombinedSettings
from mooring.data.batch import Batch
from mooring.methods.core_tuning import CoreTuning, focal_contrast
from mooring.methods.forward import Forward
from mooring.methods.hard_mixing import Draws, hard_mixed, hard_partners
from mooring.methods.registry import build_method

T = 0.07


@dataclass
class Row:
    """A row of the enlarged batch: features, label distribution, and the class if it is one."""

    features: Tensor
    target: dict[int, float]

    @property
    def label(self) -> int | None:
        return next(iter(self.target)) if len(self.target) == 1 else None


def blended(share: float, first: Tensor, y1: int, second: Tensor, y2: int) -> Row:
    target = {y1: 1.0} if y1 == y2 else {y1: share, y2: 1 - share}
    return Row(share * first + (1 - share) * second, target)


def rows_of(features: Tensor, labels: list[int], draws: Draws, release: bool) -> list[Row]:
    valid = [i for i, y in enumerate(labels) if y >= 0]
    ring = sorted(valid, key=lambda i: float(draws.order[i]))
    units = [f.detach() / f.detach().norm() for f in features]
    rows = [Row(features[i].detach() if release else features[i], {labels[i]: 1.0}) for i in valid]
    for i in valid:
        j = ring[(ring.index(i) + 1) % len(ring)]
        share = float(draws.partner_share[i])
        assert 0.8 <= share <= 1
        rows.append(blended(share, features[j], labels[j], features[i], labels[i]))
    for i in valid:
        cosine = {j: float(units[i] @ units[j]) for j in valid}
        same = [j for j in valid if j != i and labels[j] == labels[i]]
        other = [j for j in valid if labels[j] != labels[i]]
        if release:
            farthest = min(valid, key=lambda j: cosine[j] if j in same else 0.0)
            farthest = i if farthest == 0 else farthest
            nearest = max(valid, key=lambda j: cosine[j] if j in other else 0.0)
        else:
            if not other:
                continue
            farthest = min(same, key=lambda j: cosine[j]) if same else i
            nearest = max(other, key=lambda j: cosine[j])
        share = float(draws.positive_share[i])
        rows.append(blended(share, features[farthest], labels[farthest], features[nearest], labels[nearest]))
    return rows


def contrast_of(units: list[Tensor], labels: list[int | None], release: bool) -> Tensor:
    losses = []
    for i, label in enumerate(labels):
        positives = [j for j in range(len(units)) if j != i and label is not None and labels[j] == label]
        if not positives:
            continue
        keys = torch.stack([units[i] @ units[k] / T for k in range(len(units)) if k != i])
        loss = torch.zeros(()).double()
        for j in positives:
            log_p = units[i] @ units[j] / T - keys.logsumexp(0)
            focal = 1 - log_p.exp()
            loss = loss - (focal if release else focal.detach()) * log_p
        losses.append(loss / (len(units) if release else len(positives)))
    return sum(losses) / len(losses) if losses else torch.zeros(()).double()


CASES = {
    "usual": [0, 1, 2, 1, 0, 3, 1, 2, 0],
    "two classes": [1, 1, 0, 1, 0, 0],
    "padded": [0, 2, 1, 0, 2, 0, -1, -1],
    "one image a class": [0, 1, 2, 3],
    "one class": [2, 2, 2],
    "one image": [1],
    "nothing": [-1, -1],
}


def method_and_batch(labels: list[int], release: bool) -> tuple[CoreTuning, Batch]:
    parity = "release" if release else "corrected"
    method = make_method("core_tuning", "vit", parity=parity, contrast_weight=0.8, contrast_width=16)
    assert isinstance(method, CoreTuning)
    batch = make_batch(len(labels), 4, seed=6)
    method.setup(context([batch]))
    batch.labels.copy_(torch.tensor(labels))
    return method, batch


@pytest.mark.parametrize("release", [False, True], ids=["corrected", "release"])
@pytest.mark.parametrize("labels", CASES.values(), ids=CASES)
def test_loss_and_gradient_equal_a_double_loop_in_float64(labels: list[int], release: bool) -> None:
    method, batch = method_and_batch(labels, release)
    run = Forward(method, batch)
    run.features.retain_grad()
    state = method.extra_state()
    terms = method.additions(run, at(0))
    classification = method.classification(run, at(0))
    (classification + terms["focal_contrast"]).backward()
    method.load_extra_state(state)
    draws = method.draw(len(labels))

    features = run.features.detach().double().requires_grad_()
    weights = {name: p.detach().double() for name, p in method.named_parameters() if "encoder" not in name}
    rows = rows_of(features, labels, draws, release)
    entropy, units = torch.zeros(()).double(), []
    for row in rows:
        logits = weights["head.weight"] @ row.features + weights["head.bias"]
        entropy = entropy - sum(s * logits.log_softmax(0)[y] for y, s in row.target.items()) / len(rows)
        hidden = weights["contrast_mlp.0.weight"] @ row.features + weights["contrast_mlp.0.bias"]
        output = weights["contrast_mlp.2.weight"] @ hidden.clamp_min(0) + weights["contrast_mlp.2.bias"]
        units.append(output / output.norm())
    contrast = 0.8 * contrast_of(units, [row.label for row in rows], release)
    torch.testing.assert_close(classification.detach().double(), entropy.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        terms["focal_contrast"].detach().double(), contrast.detach(), rtol=1e-4, atol=1e-6
    )
    assert run.features.grad is not None
    total = entropy + contrast
    if total.requires_grad:
        total.backward()
    wanted = torch.zeros_like(features) if features.grad is None else features.grad
    scale = float(wanted.abs().max())
    torch.testing.assert_close(run.features.grad.double(), wanted, rtol=1e-3, atol=1e-4 * scale)


def test_the_released_search_for_the_farthest_positive_finds_masked_entries() -> None:
    features = torch.rand(8, 5, generator=torch.Generator().manual_seed(1))  # cosines >= 0
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 2, -1])
    positive, negative, has_negative = hard_partners(features, labels)
    units = torch.nn.functional.normalize(features, dim=1)
    cosines = units @ units.T
    for i in range(6):
        same = [j for j in range(7) if j != i and labels[j] == labels[i]]
        assert int(positive[i]) == min(same, key=lambda j: float(cosines[i, j]))
        assert labels[negative[i]] != labels[i]
    assert int(positive[6]) == 6 and has_negative[:7].all()
    released, _, _ = hard_partners(features, labels, release=True)
    # the first masked entry wins: index 0, turned into the row itself, or for rows of its class index 1
    assert released[:7].tolist() == [0, 1, 1, 3, 1, 5, 6]


def test_padding_is_no_partner_and_mixes_with_nothing() -> None:
    features = torch.randn(12, 6, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 1, -1, 2, 0, -1, 1, 2, 0, 1, -1, -1])
    features[labels < 0] = torch.inf
    draws = Draws.of(12, 1.0, torch.Generator().manual_seed(8), features.device)
    for release in (False, True):
        mixed = hard_mixed(features, labels, 3, draws, release=release)
        assert torch.equal(mixed.valid, (labels >= 0).repeat(3))
        assert torch.isfinite(mixed.features[mixed.valid]).all()
        torch.testing.assert_close(mixed.targets.sum(1), mixed.valid.float())


def test_a_row_without_positives_is_a_key_and_no_loss_is_no_nan() -> None:
    g = torch.Generator().manual_seed(2)
    units = torch.nn.functional.normalize(torch.randn(6, 4, generator=g), dim=1).requires_grad_()
    classes = torch.tensor([0, 0, -1, 1, -1, 2])
    valid = torch.tensor([True, True, True, True, False, True])
    got = focal_contrast(units, classes, valid, T)
    kept = [units[i].double() for i in (0, 1, 2, 3, 5)]
    wanted = contrast_of(kept, [0, 0, None, 1, 2], release=False)
    torch.testing.assert_close(got.detach().double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    for none in (torch.zeros(6, dtype=torch.bool), valid & (classes != 0)):
        loss = focal_contrast(units, classes, none, T)
        (grad,) = torch.autograd.grad(loss, units)
        assert loss.item() == 0 and torch.equal(grad, torch.zeros_like(grad))


def test_draws_have_a_stream_of_their_own_and_do_not_see_padding() -> None:
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    short = Draws.of(6, 0.5, generator, torch.device("cpu"))
    generator.set_state(state)
    long = Draws.of(40, 0.5, generator, torch.device("cpu"))
    for name in ("order", "partner_share", "positive_share"):
        assert torch.equal(getattr(long, name)[:6], getattr(short, name))
    assert long.partner_share.min() >= 0.8 and long.positive_share.min() < 0.5

    losses = []
    for noise in (False, True):
        method = make_method("core_tuning")
        batch = make_batch(8, 4)
        method.setup(context([batch]))
        if noise:
            torch.rand(100)  # the global stream is none of its business
        optimizer = torch.optim.SGD(trained_parameters(method), lr=0.01)
        losses.append([train_step(method, [batch], optimizer, at(s)) for s in range(2)])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


def test_as_released_the_batch_trains_the_encoder_through_mixtures_only() -> None:
    for release, reached in ((False, True), (True, False)):
        method, batch = method_and_batch([0, 1, 0, 1], release)
        run = Forward(method, batch)
        mixed = hard_mixed(run.features, batch.labels, 4, method.draw(4), release=release)
        (grad,) = torch.autograd.grad(mixed.features[:4].sum(), run.features)
        assert bool(grad.abs().sum() > 0) == reached


def test_beside_daft_its_loss_is_the_classification() -> None:
    single = make_method("core_tuning")
    parts = (DAFTSettings(), single.settings)
    method = build_method(CombinedSettings(parts=parts), single.encoder, single.head)
    batch = make_batch(8, 4)
    method.setup(context([batch]))
    method.eval()
    state = method.extra_state()
    out = method(batch, at(0))
    single.eval()
    single.load_extra_state(state["core_tuning"])
    single.contrast_mlp.load_state_dict(method.parts["core_tuning"].contrast_mlp.state_dict())
    alone = single(batch, at(0))
    torch.testing.assert_close(out.loss, alone.loss)
    name = "loss_core_tuning_focal_contrast"
    torch.testing.assert_close(out.metrics[name], alone.metrics["loss_focal_contrast"])
