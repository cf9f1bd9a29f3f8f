"""bank_cross_entropy: every implementation against a concatenated cross-entropy in float64, and formula (B)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from implementations import IMPLEMENTATIONS, draw_bank
from torch import Tensor

from mooring_kernels import bank_cross_entropy, calibrate, class_statistics
from mooring_kernels.bank_cross_entropy import op as bank_cross_entropy_op


def definition(
    features: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    smoothing: float = 0.0,
) -> Tensor:
    """Mean over the valid rows of (1 - s) (lse - x_y) + s (lse - mean x), written out."""
    total, count = (weight.sum() + features.sum() + (0 if bias is None else bias.sum())) * 0, 0
    for rows, targets in ((features, labels), (bank, bank_labels)):
        for row, label in zip(rows, targets.tolist(), strict=True):
            if not 0 <= label < len(weight):
                continue
            logits = weight @ row + (0 if bias is None else bias)
            lse = torch.logsumexp(logits, 0)
            total = total + (1 - smoothing) * (lse - logits[label]) + smoothing * (lse - logits.mean())
            count += 1
    return total / max(count, 1)


def draw(
    batch: int, rows: int, width: int, classes: int, biased: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    features, bank = (torch.randn(n, width, generator=generator) for n in (batch, rows))
    labels, bank_labels = (torch.randint(-1, classes + 1, (n,), generator=generator) for n in (batch, rows))
    weight = torch.randn(classes, width, generator=generator) / width**0.5
    return (
        features,
        labels,
        bank,
        bank_labels,
        weight,
        torch.randn(classes, generator=generator) if biased else None,
    )


def gradients(
    loss: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, upstream: float
) -> list[Tensor]:
    inputs = [features, weight] if bias is None else [features, weight, bias]
    return list(torch.autograd.grad(upstream * loss, inputs))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (5, 9, 17, 7, True),
        (1, 1, 1, 2, True),
        (3, 0, 8, 4, False),
        (0, 6, 8, 4, True),
        (6, 40, 33, 70, False),
    ],
    ids="B{0[0]}-K{0[1]}-D{0[2]}-C{0[3]}-bias{0[4]}".format,
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_forward_and_backward(
    impl: Any,
    shape: tuple[int, int, int, int, bool],
    dtype: torch.dtype,
    smoothing: float,
    generator: torch.Generator,
    assert_within: Any,
) -> None:
    drawn = draw(*shape, generator)
    inputs = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in drawn]
    exact_inputs = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    for tensors in (inputs, exact_inputs):
        for index in (0, 4, 5):
            if tensors[index] is not None:
                tensors[index].requires_grad_()
    loss, logits = bank_cross_entropy(*inputs, label_smoothing=smoothing, return_logits=True, impl=impl)  # type: ignore[call-overload]
    exact = definition(*exact_inputs, smoothing)  # type: ignore[arg-type]
    batch, rows, width, classes, _ = shape
    operations = 4 * width + 2 * classes + batch + rows + 20
    assert loss.dtype == torch.float32 and loss.shape == () and not logits.requires_grad
    assert_within(loss.detach(), exact.detach(), operations=operations, magnitude=10)
    features, _, _, _, weight, bias = exact_inputs
    expected_logits = features @ weight.T + (0 if bias is None else bias)
    assert_within(logits, expected_logits.detach(), operations=2 * width + 4, magnitude=10)
    got = gradients(loss, inputs[0], inputs[4], inputs[5], -1.7)
    expected = gradients(exact, features, weight, bias, -1.7)
    for grad, exact_grad, source in zip(got, expected, (inputs[0], inputs[4], inputs[5]), strict=False):
        assert grad.dtype == source.dtype
        assert_within(grad, exact_grad, operations=operations, magnitude=10)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_valid_row_gives_zero_with_zero_gradients(impl: Any, generator: torch.Generator) -> None:
    features, _, bank, _, weight, bias = draw(3, 4, 5, 6, True, generator)
    assert bias is not None
    leaves = [t.requires_grad_() for t in (features, weight, bias)]
    masked = torch.tensor([-1, 6, -1]), torch.full((4,), -1)
    loss = bank_cross_entropy(features, masked[0], bank, masked[1], weight, bias, impl=impl)
    assert loss.item() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_empty_bank_is_plain_cross_entropy(impl: Any, generator: torch.Generator) -> None:
    features, labels, bank, bank_labels, weight, bias = draw(7, 0, 5, 6, True, generator)
    labels = labels.clamp(0, 5)
    loss = bank_cross_entropy(features, labels, bank, bank_labels, weight, bias, impl=impl)
    plain = torch.nn.functional.cross_entropy(torch.nn.functional.linear(features, weight, bias), labels)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_bank_gets_no_gradient_and_the_encoder_that_of_its_batch(
    impl: Any, generator: torch.Generator
) -> None:
    features, labels, bank, bank_labels, weight, bias = draw(6, 20, 9, 5, True, generator)
    features.requires_grad_(), bank.requires_grad_()
    loss = bank_cross_entropy(features, labels, bank, bank_labels, weight, bias, impl=impl)
    grad, bank_grad = torch.autograd.grad(loss, [features, bank], allow_unused=True)
    assert bank_grad is None
    batch_rows, bank_rows = (((t >= 0) & (t < 5)).sum() for t in (labels, bank_labels))
    alone = bank_cross_entropy(features, labels, bank[:0], bank_labels[:0], weight, bias, impl=impl)
    (alone_grad,) = torch.autograd.grad(alone, features)
    torch.testing.assert_close(grad, alone_grad * batch_rows / (batch_rows + bank_rows), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_mean_form_times_its_factor_is_equation_14(impl: Any, generator: torch.Generator) -> None:
    """mean over B + n rows, times (1 + n / B), is L_CE + (n / B) R_DR."""
    features, labels, bank, bank_labels, weight, bias = draw(4, 12, 9, 5, True, generator)
    labels, bank_labels = labels.clamp(0, 4), bank_labels.clamp(0, 4)
    linear, cross_entropy = torch.nn.functional.linear, torch.nn.functional.cross_entropy
    task = cross_entropy(linear(features, weight, bias), labels)
    regulariser = cross_entropy(linear(bank, weight, bias), bank_labels)
    loss = bank_cross_entropy(features, labels, bank, bank_labels, weight, bias, impl=impl)
    torch.testing.assert_close(loss * (1 + 12 / 4), task + 12 / 4 * regulariser, rtol=1e-5, atol=1e-6)
    paper = bank_cross_entropy(features, labels, bank, bank_labels, weight, bias, normaliser=4.0, impl=impl)
    torch.testing.assert_close(paper, task + 12 / 4 * regulariser, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("biased", [True, False])
def test_formula_b_equals_the_direct_path(biased: bool, generator: torch.Generator) -> None:
    """Rotating the head instead of the bank (spec 1.6, item 3), an independent route to loss and dW, db."""
    frozen, tuned, bank_labels, head = (
        t.double() if t.is_floating_point() else t for t in draw_bank(30, 11, 4, generator)
    )
    features, labels = torch.randn(5, 11, generator=generator).double(), torch.tensor([0, 3, 1, -1, 2])
    weight = (100 * head).requires_grad_()
    bias = torch.randn(4, generator=generator).double().requires_grad_() if biased else None
    rotation = torch.linalg.qr(torch.randn(11, 11, generator=generator).double())[0]
    scale = 1.7
    calibrated = calibrate(frozen, tuned, bank_labels, weight, rotation, scale)
    loss = bank_cross_entropy(features[:0], labels[:0], calibrated, bank_labels, weight, bias)
    direct = torch.autograd.grad(loss, [weight] if bias is None else [weight, bias])

    with torch.no_grad():
        m, mu, _ = class_statistics(frozen, tuned, bank_labels, weight)
        valid = (bank_labels >= 0) & (bank_labels < 4)
        own, n = bank_labels[valid], int(valid.sum())
        r = frozen[valid] - m[own]
        norm = (r.square().sum(1) + mu[own].square().sum(1) + 2 * ((mu @ rotation)[own] * r).sum(1)).sqrt()
        c = scale / norm
        logits = c[:, None] * ((mu @ weight.T)[own] + r @ (weight @ rotation).T) + (
            0 if bias is None else bias
        )
        excess = torch.softmax(logits, 1) - torch.nn.functional.one_hot(own, 4)
        g = c[:, None] * excess
        h = torch.zeros(4, 4, dtype=torch.float64).index_add(0, own, g)
        grad_weight = ((g.T @ r) @ rotation.T + h.T @ mu) / n
        expected_loss = torch.nn.functional.cross_entropy(logits, own)
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(direct[0], grad_weight, rtol=0, atol=1e-12)
    if bias is not None:
        torch.testing.assert_close(direct[1], excess.sum(0) / n, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_autocast_changes_nothing(impl: Any, generator: torch.Generator) -> None:
    features, labels, bank, bank_labels, weight, bias = draw(6, 20, 9, 5, True, generator)
    weight.requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = bank_cross_entropy(features, labels, bank, bank_labels, weight, bias, impl=impl)
        results.append((loss.detach(), *torch.autograd.grad(loss, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_only_the_gradients_that_are_asked_for(impl: Any, generator: torch.Generator) -> None:
    for wanted in (0, 4, 5):
        tensors = draw(3, 4, 5, 6, True, generator)
        leaf = tensors[wanted]
        assert leaf is not None
        loss = bank_cross_entropy(*tensors[:4], tensors[4], tensors[5].requires_grad_(wanted == 5), impl=impl)  # type: ignore[union-attr]
        assert loss.requires_grad == (wanted == 5)
        leaf.requires_grad_()
        (grad,) = torch.autograd.grad(bank_cross_entropy(*tensors, impl=impl), leaf)
        (expected,) = torch.autograd.grad(bank_cross_entropy(*tensors, impl="reference"), leaf)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_thousand_classes_and_a_nan_that_must_show(impl: Any, generator: torch.Generator) -> None:
    tensors = list(draw(2, 6, 4, 1000, True, generator))
    tensors[1] = torch.tensor([0, 999])
    loss = bank_cross_entropy(*tensors, impl=impl)  # type: ignore[call-overload]
    exact = definition(*[t.double() if t.is_floating_point() else t for t in tensors])  # type: ignore[union-attr, arg-type, misc]
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    tensors[0][0, 0] = torch.nan  # type: ignore[index]
    assert bank_cross_entropy(*tensors, impl=impl).isnan()  # type: ignore[call-overload]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_nan_in_a_masked_row_stays_out_of_loss_and_features(impl: Any, generator: torch.Generator) -> None:
    drawn = draw(4, 9, 17, 7, True, generator)
    drawn[1][:], drawn[3][[0, 8]] = torch.tensor([3, -1, 7, 0]), torch.tensor([-1, 7])
    leaves = [drawn[i].requires_grad_() for i in (0, 5)]  # type: ignore[union-attr]
    results = []
    for _ in range(2):
        loss = bank_cross_entropy(*drawn, label_smoothing=0.1, impl=impl)  # type: ignore[call-overload]
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        with torch.no_grad():
            drawn[0][[1, 2]] = drawn[2][[0, 8]] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[1][1][[1, 2]].any()


def test_several_chunks_of_rows_are_one_sum(generator: torch.Generator, monkeypatch: Any) -> None:
    """Also with the batch longer than a chunk."""
    from mooring_kernels.bank_cross_entropy import head_pass

    monkeypatch.setattr(head_pass, "_CPU_ROWS", 4)
    drawn = draw(6, 11, 9, 5, True, generator)
    for leaf in (drawn[0], drawn[4], drawn[5]):
        leaf.requires_grad_()  # type: ignore[union-attr]
    results = []
    for impl in ("native", "reference"):
        loss = bank_cross_entropy(*drawn, label_smoothing=0.1, impl=impl)  # type: ignore[call-overload]
        results.append([loss, *torch.autograd.grad(loss, [drawn[0], drawn[4], drawn[5]])])  # type: ignore[list-item]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_logits_of_all_rows_never_exist_together(generator: torch.Generator) -> None:
    """Largest tensor of a step: one chunk, or the head."""
    from torch.utils._python_dispatch import TorchDispatchMode

    drawn = draw(8, 2048, 4, 300, True, generator)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // 4)
            return result

    body = (
        bank_cross_entropy_op._forward._init_fn
    )  # beneath the operator, where a dispatch mode sees each step
    with Sizes():
        body(*drawn, 0.0, False, [True, True, True], "native")
    assert 512 * 300 <= largest < 2048 * 300 / 3
