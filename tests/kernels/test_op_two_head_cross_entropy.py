"""two_head_cross_entropy: every implementation against two separate losses in float64, and its properties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS
from torch import Tensor

from mooring_kernels import two_head_cross_entropy

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
UPSTREAM = (-1.7, 0.6, 2.1)  # of loss, target loss and source loss


def mean(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    total, count = logits.sum() * 0, 0
    for row, label in zip(logits, labels.tolist(), strict=True):
        if 0 <= label < len(row):
            log_softmax = torch.log_softmax(row, 0)
            total = total - (1 - smoothing) * log_softmax[label] - smoothing * log_softmax.mean()
            count += 1
    return total / max(count, 1)


def definition(rows: Rows, weight: float, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    target, source = mean(rows[0], rows[1], smoothing), mean(rows[2], rows[3], smoothing)
    return target + weight * source, target, source


def draw(
    shape: tuple[int, int, int, int], generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Rows:
    batch, classes, source_rows, source_classes = shape
    return (
        (3 * torch.randn(batch, classes, generator=generator)).to(dtype),
        torch.randint(-1, classes + 1, (batch,), generator=generator),
        (3 * torch.randn(source_rows, source_classes, generator=generator)).to(dtype),
        torch.randint(-1, source_classes + 1, (source_rows,), generator=generator),
    )


def with_gradients(rows: Rows, call: Any, upstream: tuple[float, ...] = UPSTREAM) -> list[Tensor]:
    target, source = (rows[i].detach().clone().requires_grad_() for i in (0, 2))
    losses = call((target, rows[1], source, rows[3]))
    total = sum(factor * loss for factor, loss in zip(upstream, losses, strict=True) if factor)
    grads = torch.autograd.grad(total, (target, source), allow_unused=True, materialize_grads=True)
    return [*(loss.detach() for loss in losses), *grads]


def by(impl: Any, weight: Any = 0.4, smoothing: float = 0.0) -> Any:
    return lambda rows: two_head_cross_entropy(*rows, weight, label_smoothing=smoothing, impl=impl)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(5, 7, 9, 37), (1, 1, 1, 2), (3, 200, 0, 5), (0, 4, 6, 17), (17, 12, 2, 8209)],
    ids="B{0[0]}-C{0[1]}-S{0[2]}-CS{0[3]}".format,
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_forward_and_backward(
    impl: Any,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    smoothing: float,
    generator: torch.Generator,
    assert_within: Any,
) -> None:
    rows = draw(shape, generator, dtype)
    for labels, classes in ((rows[1], shape[1]), (rows[3], shape[3])):
        labels[-1:] = classes - 1
    before = [t.clone() for t in rows]
    got = with_gradients(rows, by(impl, 0.4, smoothing))
    exact_rows = (rows[0].double(), rows[1], rows[2].double(), rows[3])
    expected = with_gradients(exact_rows, lambda r: definition(r, 0.4, smoothing))
    operations = max(shape[1], shape[3]) ** 0.5 + 24
    for result, exact in zip(got, expected, strict=True):
        assert_within(result, exact, operations=operations, magnitude=60.0)
    assert all(loss.dtype == torch.float32 and loss.shape == () for loss in got[:3])
    assert got[3].dtype == got[4].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(rows, before, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_weight_as_a_tensor_and_gradients_of_each_output(impl: Any, generator: torch.Generator) -> None:
    rows = draw((4, 6, 5, 9), generator)
    rows[1][0], rows[3][0] = 0, 0
    number, tensor = (with_gradients(rows, by(impl, w)) for w in (0.25, torch.tensor(0.25)))
    assert all(torch.equal(a, b) for a, b in zip(number, tensor, strict=True))
    parts = [with_gradients(rows, by(impl, 0.25), alone) for alone in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert not parts[1][4].any() and not parts[2][3].any()
    assert torch.equal(parts[0][3], parts[1][3])  # the target's weight is 1
    torch.testing.assert_close(parts[0][4], 0.25 * parts[2][4], rtol=1e-6, atol=0)
    learned = torch.tensor(0.25, requires_grad=True)
    leaf = rows[0].clone().requires_grad_()
    loss = two_head_cross_entropy(leaf, *rows[1:], learned, impl=impl)[0]
    assert torch.autograd.grad(loss, learned, allow_unused=True, retain_graph=True) == (None,)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_only_the_gradients_that_are_asked_for(impl: Any, generator: torch.Generator) -> None:
    rows = draw((4, 6, 5, 9), generator)
    rows[1][0], rows[3][0] = 0, 0
    expected = with_gradients(rows, by(impl), (1.0, 0.0, 0.0))
    for place, grad in ((0, expected[3]), (2, expected[4])):
        leaves = [t.clone() for t in rows]
        leaves[place].requires_grad_()
        loss = two_head_cross_entropy(*leaves, 0.4, impl=impl)[0]  # type: ignore[call-arg, arg-type, misc]
        assert torch.equal(torch.autograd.grad(loss, leaves[place])[0], grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_valid_row_gives_zero_with_zero_gradients(impl: Any, generator: torch.Generator) -> None:
    rows = draw((3, 4, 5, 6), generator)
    rows[1][:], rows[3][:] = torch.tensor([-1, 4, -100]), 6
    assert not any(result.any() for result in with_gradients(rows, by(impl)))
    rows[1][0] = 2
    loss, target, source, _, grad = with_gradients(rows, by(impl))
    assert target > 0 and torch.equal(loss, target) and source == 0 and not grad.any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masked_rows_are_not_read_and_a_nan_shows(impl: Any, generator: torch.Generator) -> None:
    rows = draw((3, 20, 3, 33), generator)
    rows[0][1], rows[2][2] = torch.nan, torch.nan
    rows[1][:], rows[3][:] = torch.tensor([0, -1, 19]), torch.tensor([0, 32, 33])
    assert all(result.isfinite().all() for result in with_gradients(rows, by(impl)))
    rows[3][2] = 3
    loss, target, source, *_ = with_gradients(rows, by(impl))
    assert loss.isnan() and target.isfinite() and source.isnan()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides_and_autocast(impl: Any, generator: torch.Generator) -> None:
    rows = draw((6, 8, 6, 8), generator)
    expected = with_gradients(rows, by(impl))
    spread, labels = torch.stack([rows[0], rows[2]], 2), torch.stack([rows[1], rows[3]], 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        strided = two_head_cross_entropy(
            spread[:, :, 0], labels[:, 0], rows[2].T.contiguous().T, labels[:, 1], 0.4, impl=impl
        )
    assert all(torch.equal(a, b) for a, b in zip(strided, expected[:3], strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=6, deadline=None)
@given(shape=st.tuples(*(st.integers(1, n) for n in (5, 30, 5, 30))), seed=st.integers(0, 99))
def test_permutation_and_relabelling(impl: Any, shape: tuple[int, int, int, int], seed: int) -> None:
    """Order of rows, names of classes and a shift of a row's logits are free in each head."""
    generator = torch.Generator().manual_seed(seed)
    rows = draw(shape, generator)
    moved: list[Tensor] = []
    orders = []
    for logits, labels in (rows[:2], rows[2:]):
        order, names = (torch.randperm(n, generator=generator) for n in logits.shape)
        inverse = torch.empty_like(names)
        inverse[names] = torch.arange(len(names))
        valid = (labels >= 0) & (labels < len(names))
        renamed = torch.where(valid, inverse[labels.clamp(0, len(names) - 1)], labels)
        moved += [logits[order][:, names] + 7.0, renamed[order]]
        orders.append((order, names))
    before, after = (
        with_gradients(rows, by(impl, smoothing=0.1)),
        with_gradients(
            tuple(moved),
            by(impl, smoothing=0.1),  # type: ignore[arg-type]
        ),
    )
    for a, b in zip(before[:3], after[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b, (order, names) in zip(before[3:], after[3:], orders, strict=True):
        torch.testing.assert_close(a[order][:, names], b, rtol=1e-4, atol=1e-5)
