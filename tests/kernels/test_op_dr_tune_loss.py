"""dr_tune_loss: every implementation and both sides that can be rotated against loops over classes in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS, draw_bank
from torch import Tensor

from mooring_kernels import bank_cross_entropy, calibrate, dr_tune_loss
from mooring_kernels.dr_tune_loss.block import rotates_the_head


def definition(
    features: Tensor,
    labels: Tensor,
    frozen: Tensor,
    tuned: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rotation: Tensor | None,
    scale: float,
    cga_scale: float,
    smoothing: float,
) -> Tensor:
    """Spec 1.4 and 1(c), a loop over rows and their class mates."""
    classes, head = weight.shape[0], weight.detach()
    pairs = [
        (row, label) for row, label in zip(features, labels.tolist(), strict=True) if 0 <= label < classes
    ]
    for k, label in enumerate(bank_labels.tolist()):
        if not 0 <= label < classes:
            continue
        mates = bank_labels == label
        confidence = torch.softmax(cga_scale * (tuned[mates] @ head[label]) / head[label].norm(), 0)
        residual = frozen[k] - frozen[mates].mean(0)
        moved = (residual if rotation is None else rotation @ residual) + confidence @ tuned[mates]
        pairs.append((scale * moved / moved.norm().clamp_min(1e-12), label))
    total = 0 * (weight.sum() + features.sum() + (0 if bias is None else bias.sum()))
    for row, label in pairs:
        logits = weight @ row + (0 if bias is None else bias)
        lse = torch.logsumexp(logits, 0)
        total = total + (1 - smoothing) * (lse - logits[label]) + smoothing * (lse - logits.mean())
    return total / max(len(pairs), 1)


def draw(
    shape: tuple[int, int, int, int], rotated: bool, biased: bool, generator: torch.Generator
) -> list[Any]:
    batch, rows, width, classes = shape
    frozen, tuned, bank_labels, head = draw_bank(rows, width, classes, generator)
    return [
        torch.randn(batch, width, generator=generator),
        torch.randint(-1, classes + 1, (batch,), generator=generator),
        frozen,
        tuned,
        bank_labels,
        100 * head / width**0.5,
        torch.randn(classes, generator=generator) if biased else None,
        torch.linalg.qr(torch.randn(width, width, generator=generator))[0] if rotated else None,
    ]


# 3 C < K: the head is rotated; else the bank
SHAPES = [(5, 40, 17, 7), (3, 9, 8, 5), (0, 7, 6, 2), (4, 0, 5, 3), (1, 1, 1, 1), (6, 70, 33, 40)]


@pytest.mark.parametrize("rotated", [False, True], ids=["direct", "rotated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}-K{0[1]}-D{0[2]}-C{0[3]}".format)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_forward_and_backward(
    impl: Any,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    rotated: bool,
    generator: torch.Generator,
    assert_within: Any,
) -> None:
    biased, smoothing, cga_scale, scale = shape[1] % 2 == 0, 0.1 * (shape[0] % 2), 3.0, 2.5
    drawn = draw(shape, rotated, biased, generator)
    inputs = [
        t.to(dtype) if i < 7 and t is not None and t.is_floating_point() else t for i, t in enumerate(drawn)
    ]
    exact = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    leaves = [5, 6, 0] if biased else [5, 0]
    for tensors in (inputs, exact):
        for index in leaves:
            tensors[index].requires_grad_()
    options = {"cga_scale": cga_scale, "label_smoothing": smoothing}
    loss, logits = dr_tune_loss(*inputs, scale, **options, return_logits=True, impl=impl)
    expected = definition(*exact, scale, cga_scale, smoothing)
    batch, rows, width, classes = shape
    # the rotation multiplies once more, and R is orthogonal to fp32 only: its error is one of the rows
    operations = (8 if rotated else 4) * width + 2 * classes + batch + rows + 20
    assert loss.dtype == torch.float32 and loss.shape == () and not logits.requires_grad
    assert_within(loss.detach(), expected.detach(), operations=operations, magnitude=10)
    assert_within(
        logits,
        (exact[0] @ exact[5].T + (0 if exact[6] is None else exact[6])).detach(),
        operations=2 * width + 4,
        magnitude=10,
    )
    got = torch.autograd.grad(-1.7 * loss, [inputs[i] for i in leaves])
    want = torch.autograd.grad(-1.7 * expected, [exact[i] for i in leaves])
    for grad, exact_grad, index in zip(got, want, leaves, strict=True):
        assert grad.dtype == inputs[index].dtype
        assert_within(grad, exact_grad, operations=operations, magnitude=10)


def test_both_sides_are_rotated_in_these_tests() -> None:
    assert {rotates_the_head(rows, classes) for _, rows, _, classes in SHAPES} == {True, False}
    assert not rotates_the_head(600, 200) and rotates_the_head(601, 200)


@pytest.mark.parametrize("rotated", [False, True], ids=["direct", "rotated"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equals_the_ops_in_a_row_and_a_bank_rotated_beforehand(
    impl: Any, rotated: bool, generator: torch.Generator
) -> None:
    drawn = draw((5, 30, 11, 4), rotated, True, generator)
    features, labels, frozen, tuned, bank_labels, weight, bias, rotation = drawn
    weight.requires_grad_(), features.requires_grad_()
    calibrated = calibrate(frozen, tuned, bank_labels, weight, rotation, 1.7, impl=impl)
    row = bank_cross_entropy(features, labels, calibrated, bank_labels, weight, bias, impl=impl)
    expected = (row, *torch.autograd.grad(row, [features, weight]))
    beforehand = frozen if rotation is None else frozen @ rotation.T
    for rows, turn in ((frozen, rotation), (beforehand, None)):
        loss = dr_tune_loss(features, labels, rows, tuned, bank_labels, weight, bias, turn, 1.7, impl=impl)
        for a, b in zip((loss, *torch.autograd.grad(loss, [features, weight])), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rotated", [False, True], ids=["direct", "rotated"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masked_bank_rows_are_not_read(impl: Any, rotated: bool, generator: torch.Generator) -> None:
    drawn = draw((3, 40, 9, 5), rotated, True, generator)
    drawn[5].requires_grad_()
    results = []
    for _ in range(2):
        loss = dr_tune_loss(*drawn, 1.7, impl=impl)
        results.append((loss.detach(), *torch.autograd.grad(loss, drawn[5])))
        masked = (drawn[4] < 0) | (drawn[4] >= 5)
        assert masked.any()
        drawn[2][masked] = drawn[3][masked] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_valid_row_gives_zero_with_zero_gradients(impl: Any, generator: torch.Generator) -> None:
    drawn = draw((3, 8, 5, 6), True, True, generator)
    drawn[1], drawn[4] = torch.full((3,), -1), torch.full((8,), 6)
    leaves = [drawn[i].requires_grad_() for i in (0, 5, 6)]
    loss = dr_tune_loss(*drawn, 1.0, impl=impl)
    assert loss.item() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(loss, leaves))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), rotated=st.booleans(), classes=st.integers(2, 20))
def test_order_of_rows_and_classes_means_nothing(seed: int, rotated: bool, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = draw((4, 25, 7, classes), rotated, True, generator)
    features, labels, frozen, tuned, bank_labels, weight, bias, rotation = drawn
    loss = dr_tune_loss(*drawn, 1.7)
    order = torch.randperm(25, generator=generator)
    shuffled = dr_tune_loss(
        features, labels, frozen[order], tuned[order], bank_labels[order], weight, bias, rotation, 1.7
    )
    torch.testing.assert_close(loss, shuffled, rtol=1e-5, atol=1e-6)
    names = torch.randperm(classes, generator=generator)  # class c is now names[c]

    def renamed(given_labels: Tensor) -> Tensor:
        valid = (given_labels >= 0) & (given_labels < classes)
        return torch.where(valid, names[torch.where(valid, given_labels, 0)], -1)

    back = torch.argsort(names)
    relabelled = dr_tune_loss(
        features,
        renamed(labels),
        frozen,
        tuned,
        renamed(bank_labels),
        weight[back],
        bias[back],
        rotation,
        1.7,
    )
    torch.testing.assert_close(loss, relabelled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_autocast_changes_nothing(impl: Any, generator: torch.Generator) -> None:
    drawn = draw((6, 40, 9, 5), True, True, generator)
    drawn[5].requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = dr_tune_loss(*drawn, 1.7, impl=impl)
        results.append((loss.detach(), *torch.autograd.grad(loss, drawn[5])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_wider_than_a_view_of_them(generator: torch.Generator) -> None:
    """Non-contiguous banks, head and rotation."""
    drawn = draw((4, 30, 8, 5), True, True, generator)
    dense = dr_tune_loss(*drawn, 1.7)
    strided = [
        t.repeat_interleave(2, -1)[..., ::2] if t is not None and t.is_floating_point() else t for t in drawn
    ]
    assert not strided[2].is_contiguous()
    torch.testing.assert_close(dr_tune_loss(*strided, 1.7), dense, rtol=1e-6, atol=0)
