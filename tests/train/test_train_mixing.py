from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mooring.methods.classification import batch_cross_entropy
from mooring.train.mixing import Mixed, mix, soft_targets

LABELS = torch.tensor([3, -1, 0, 2, 2, -1, 1])
KINDS = {"mixup": (0.4, 0.0), "cutmix": (0.0, 1.0)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int = 1) -> Tensor:
    x = torch.randn(len(LABELS), 3, 13, 17, generator=generator(seed))
    return x.contiguous(memory_format=torch.channels_last)


def mixed(kind: str, seed: int = 0, labels: Tensor = LABELS) -> Mixed:
    mixup, cutmix = KINDS[kind]
    return mix(images()[: len(labels)], labels, mixup=mixup, cutmix=cutmix, generator=generator(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_padding_rows_are_untouched_and_never_mixed_in(kind: str, seed: int) -> None:
    x, out = images(), mixed(kind, seed)
    valid = LABELS >= 0
    assert torch.equal(out.images[~valid], x[~valid])
    assert (out.partner_labels[~valid] == -1).all() and (out.partner_labels[valid] >= 0).all()
    rows = torch.arange(len(LABELS))
    assert torch.equal(out.partner[~valid], rows[~valid])
    # every valid row is a partner once, and of another row
    assert sorted(out.partner[valid].tolist()) == rows[valid].tolist()
    assert (out.partner[valid] != rows[valid]).all()
    assert torch.equal(out.partner_labels, LABELS[out.partner]) and torch.equal(out.labels, LABELS)


@pytest.mark.parametrize("seed", range(8))
def test_mixup_is_the_weighted_sum(seed: int) -> None:
    x, out = images(), mixed("mixup", seed)
    expected = out.lam * x.double() + (1 - out.lam) * x[out.partner].double()
    # one subtraction, one product, one sum in fp32 on numbers below 8
    torch.testing.assert_close(
        out.images.double(), expected, rtol=0, atol=8 * 4 * torch.finfo(torch.float32).eps
    )
    assert 0 <= out.lam <= 1


@pytest.mark.parametrize("seed", range(12))
def test_cutmix_pastes_one_box_and_counts_its_pixels(seed: int) -> None:
    x, out = images(), mixed("cutmix", seed)
    pasted = (out.images != x).any(1)  # [B, H, W]
    box = pasted.any(0)
    share = box.float().mean().item()
    assert out.lam == pytest.approx(1 - share, abs=1e-6)
    rows, columns = box.any(1).nonzero().flatten(), box.any(0).nonzero().flatten()
    if len(rows):
        assert box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
    for b in range(len(LABELS)):
        source = torch.where(box, x[out.partner[b]], x[b])
        assert torch.equal(out.images[b], source)


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_is_not_written_to_and_the_layout_is_kept(kind: str) -> None:
    x = images()
    before = x.clone()
    mixup, cutmix = KINDS[kind]
    out = mix(x, LABELS, mixup=mixup, cutmix=cutmix, generator=generator(3))
    assert torch.equal(x, before)
    assert out.images.is_contiguous(memory_format=torch.channels_last) and out.images.dtype == x.dtype


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_is_the_only_state(kind: str) -> None:
    mixup, cutmix = KINDS[kind]
    g = generator(5)
    mix(images(), LABELS, mixup=mixup, cutmix=cutmix, generator=g)
    state = g.get_state()
    first = mix(images(), LABELS, mixup=mixup, cutmix=cutmix, generator=g)
    torch.manual_seed(77)
    g.set_state(state)
    second = mix(images(), LABELS, mixup=mixup, cutmix=cutmix, generator=g)
    assert first.lam == second.lam and torch.equal(first.images, second.images)
    assert not torch.equal(
        first.images, mix(images(), LABELS, mixup=mixup, cutmix=cutmix, generator=g).images
    )


def test_off_is_the_same_batch() -> None:
    x = images()
    out = mix(x, LABELS, mixup=0, cutmix=0, generator=generator())
    assert out.images is x and out.lam == 1.0 and torch.equal(out.partner_labels, LABELS)


def test_both_on_takes_both() -> None:
    g, boxes = generator(), 0
    for _ in range(40):
        out = mix(images(), LABELS, mixup=1.0, cutmix=1.0, generator=g)
        boxes += torch.equal(out.images[:, :, 0, 0], images()[:, :, 0, 0]) or torch.equal(
            out.images[:, :, -1, -1], images()[:, :, -1, -1]
        )
    assert 8 < boxes < 32  # a fair coin leaves this range once in 10^4 seeds


@pytest.mark.parametrize("labels", [[-1, -1], [2], [2, -1], [-1]])
def test_without_another_valid_row_nothing_is_mixed(labels: list[int]) -> None:
    given = torch.tensor(labels)
    out = mixed("mixup", labels=given)
    assert torch.equal(out.images, images()[: len(given)]) and torch.equal(out.partner_labels, given)


def test_beta_has_the_right_spread() -> None:
    g = generator()
    lams = torch.tensor(
        [mix(images(), LABELS, mixup=0.4, cutmix=0, generator=g).lam for _ in range(2000)],
        dtype=torch.float64,
    )
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)); the margins are five standard errors
    variance = 1 / (4 * (2 * 0.4 + 1))
    assert abs(lams.mean() - 0.5) < 5 * (variance / 2000) ** 0.5
    assert abs(lams.var() - variance) < 5 * variance * (2 / 2000) ** 0.5


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_soft_targets_give_the_weighted_cross_entropy(kind: str, smoothing: float) -> None:
    out = mixed(kind, 4)
    logits = torch.randn(len(LABELS), 5, generator=generator(2), requires_grad=True)
    loss = batch_cross_entropy(logits, out.soft_targets(5), smoothing)
    first, second = (
        F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=smoothing)
        for labels in (out.labels, out.partner_labels)
    )
    expected = out.lam * first + (1 - out.lam) * second
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    (got,) = torch.autograd.grad(loss, logits)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    assert not got[LABELS < 0].any()


@given(classes=st.integers(4, 9))
def test_soft_targets_are_distributions(classes: int) -> None:
    targets = soft_targets(LABELS, classes)
    sums = targets.sum(1)
    assert torch.equal(sums == 0, LABELS < 0)
    torch.testing.assert_close(sums[LABELS >= 0], torch.ones(5), rtol=0, atol=1e-5)
    assert torch.equal(targets.argmax(1)[LABELS >= 0], LABELS[LABELS >= 0])


def test_the_loss_of_padding_alone_is_zero_with_zero_gradient() -> None:
    logits = torch.full((2, 3), float("inf"), requires_grad=True)
    loss = batch_cross_entropy(logits, torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros(2, 3))


def test_the_loss_is_fp32_for_half_precision_logits() -> None:
    logits = torch.randn(4, 3, generator=generator()).bfloat16()
    targets = soft_targets(torch.tensor([0, 1, 2, 1]), 3)
    loss = batch_cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), targets), rtol=1e-6, atol=1e-6)
