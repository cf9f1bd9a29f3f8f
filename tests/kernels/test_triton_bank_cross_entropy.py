"""Triton softmax cross-entropy over rows, in place, against its float64 definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from mooring_kernels.bank_cross_entropy.gpu import softmax_cross_entropy_rows_

# one column; odd; several rows per program; more columns than one block holds: the online softmax rescales
SHAPES = [(1, 1), (5, 10), (33, 200), (3, 1000), (2, 8209)]
SMOOTHING = [0.0, 0.1]


def definition(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """(loss rows, d loss / d logits) in float64; zeros on masked rows."""
    logits = logits.double()
    rows, classes = logits.shape
    valid = (labels >= 0) & (labels < classes)
    target = torch.full_like(logits, smoothing / classes)
    target[torch.arange(rows, device=logits.device)[valid], labels[valid]] += 1.0 - smoothing
    log_softmax = logits.log_softmax(1)
    loss = torch.where(valid, -(target * log_softmax).sum(1), 0.0)
    return loss, torch.where(valid[:, None], log_softmax.exp() - target, 0.0)


def draw(shape: tuple[int, int], device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    logits = (3.0 * torch.randn(shape, generator=generator)).to(device)
    labels = torch.randint(-1, shape[1] + 1, (shape[0],), generator=generator).to(
        device
    )  # -1 and C are masked
    labels[0] = shape[1] - 1
    return logits, labels


def loss_and_gradient(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Of a copy, which is dense; the loss is the same with and without the gradient."""
    grad = logits.clone()
    loss = softmax_cross_entropy_rows_(grad, labels, smoothing, True)
    alone = softmax_cross_entropy_rows_(logits.clone(), labels, smoothing, False)
    assert torch.equal(loss.nan_to_num(9), alone.nan_to_num(9))
    return loss, grad


@pytest.mark.parametrize("smoothing", SMOOTHING, ids="smooth{}".format)
@pytest.mark.parametrize("shape", SHAPES, ids="N{0[0]}-C{0[1]}".format)
def test_loss_and_gradient(
    shape: tuple[int, int],
    smoothing: float,
    device: torch.device,
    generator: torch.Generator,
    guard: Any,
    guarded_empty: None,
    assert_within: Any,
) -> None:
    """Rows lie apart, as in a padded buffer; what is between them is neither read nor written."""
    logits, labels = draw(shape, device, generator)
    rows, classes = shape
    padded = guard(torch.full((rows, classes + 5), float("nan"), device=device))
    padded[:, :classes] = logits
    padded[(labels < 0) | (labels >= classes)] = float("nan")  # masked rows are not read
    expected_loss, expected_grad = definition(logits, labels, smoothing)
    largest = 2.0 * logits.abs().max().item() + 1.0
    operations = classes**0.5 + 32
    before = padded.clone()
    loss = softmax_cross_entropy_rows_(padded[:, :classes], labels, smoothing, False)
    assert_within(loss, expected_loss, operations=operations, magnitude=largest)
    assert torch.equal(padded.nan_to_num(9), before.nan_to_num(9))
    loss = softmax_cross_entropy_rows_(padded[:, :classes], labels, smoothing, True)
    assert_within(loss, expected_loss, operations=operations, magnitude=largest)
    # an error of log p is a relative one of p <= 1
    assert_within(padded[:, :classes], expected_grad, operations=operations, magnitude=largest)
    assert padded[:, classes:].isnan().all()


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids="N{0[0]}-C{0[1]}".format)
def test_dense_rows_stay_within_bounds(
    shape: tuple[int, int],
    device: torch.device,
    generator: torch.Generator,
    guard: Any,
    guarded_empty: None,
    assert_within: Any,
) -> None:
    """No gap after a row: a store past its end would reach the next row or the canaries."""
    logits, labels = draw(shape, device, generator)
    grad = guard(logits)
    loss = softmax_cross_entropy_rows_(grad, labels, 0.1, True)
    expected_loss, expected_grad = definition(logits, labels, 0.1)
    bound = {"operations": shape[1] ** 0.5 + 32, "magnitude": 2.0 * logits.abs().max().item() + 1.0}
    assert_within(loss, expected_loss, **bound)
    assert_within(grad, expected_grad, **bound)


@pytest.mark.parametrize("smoothing", SMOOTHING, ids="smooth{}".format)
def test_masked_rows_are_zero_and_not_read(smoothing: float, device: torch.device) -> None:
    logits = torch.full((4, 6), float("nan"), device=device)
    logits[2] = torch.arange(6.0)
    labels = torch.tensor([-1, 6, 3, -100], device=device)
    loss, grad = loss_and_gradient(logits, labels, smoothing)
    masked = [0, 1, 3]
    assert not loss[masked].any() and not grad[masked].any()
    assert loss[2].isfinite() and grad[2].isfinite().all()


@pytest.mark.parametrize("smoothing", SMOOTHING, ids="smooth{}".format)
@pytest.mark.parametrize("shift", [-1e4, 1e4, 1e30])
def test_a_common_shift_changes_no_loss(
    shift: float, smoothing: float, device: torch.device, generator: torch.Generator, assert_within: Any
) -> None:
    """The shifted logits are the input; their own loss is exact up to fp32 rounding of small numbers."""
    logits, labels = draw((6, 37), device, generator)
    shifted = logits + shift
    loss, _ = loss_and_gradient(shifted, labels, smoothing)
    expected = definition(shifted, labels, smoothing)[0]
    spread = (shifted.max(1, keepdim=True).values - shifted).double().max().item() + 1.0
    assert_within(loss, expected, operations=32, magnitude=spread)


def test_forbidden_classes_and_certain_rows(device: torch.device) -> None:
    """-inf logits take no mass, also when a whole block of columns is -inf; a huge margin gives loss 0."""
    logits = torch.full((2, 8200), float("-inf"), device=device)
    logits[0, 8199], logits[0, 8190] = 1.0, 1.0
    logits[1, 0], logits[1, 1:] = 1e30, -1e30
    labels = torch.tensor([8199, 0], device=device)
    loss, grad = loss_and_gradient(logits, labels, 0.0)
    torch.testing.assert_close(loss.cpu(), torch.tensor([2.0, 1.0]).log(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(
        grad[0, [0, 8190, 8199]].cpu(), torch.tensor([0.0, 0.5, -0.5]), rtol=0.0, atol=1e-6
    )
    assert grad.isfinite().all()


def test_strided_rows_and_labels(device: torch.device, generator: torch.Generator) -> None:
    """Rows apart that begin off alignment, labels apart; columns apart are refused and left alone."""
    logits, labels = draw((6, 90), device, generator)
    labels = labels.clamp_max(29)
    loss, grad = loss_and_gradient(logits[:, 7:37].contiguous(), labels, 0.1)
    buffer, apart = logits.clone(), labels.repeat_interleave(3)[::3]
    assert torch.equal(softmax_cross_entropy_rows_(buffer[:, 7:37], apart, 0.1, True), loss)
    assert torch.equal(buffer[:, 7:37], grad)
    assert torch.equal(buffer[:, :7], logits[:, :7]) and torch.equal(buffer[:, 37:], logits[:, 37:])
    for view in (buffer[:, ::3], buffer.T[:6], buffer.bfloat16()):
        before = view.clone()
        with pytest.raises(AssertionError):
            softmax_cross_entropy_rows_(view, labels, 0.1, True)
        assert torch.equal(view, before)


def test_no_rows(device: torch.device) -> None:
    logits, labels = torch.zeros(0, 5, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    for gradient in (False, True):
        assert softmax_cross_entropy_rows_(logits, labels, 0.0, gradient).shape == (0,)
